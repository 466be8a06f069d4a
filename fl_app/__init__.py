"""The ground both sides stand on, and the two doors that Flower opens."""
