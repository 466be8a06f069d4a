"""The site's side: private rows in, DP releases out."""
