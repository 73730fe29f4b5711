"""Sessions and tokens of people, and the keys that sign them."""
