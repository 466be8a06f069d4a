"""The server side: one round from uploads to a better target model."""
