"""What runs beside one robot."""
