"""Files of people and results of tasks: rows in a database, bytes in a folder."""
