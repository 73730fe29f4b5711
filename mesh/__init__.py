"""What two services would otherwise both write. Knows no service."""

VERSION = "0.1.0"
