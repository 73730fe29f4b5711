"""The client's version; the same as the server's of the same release, which `atelier doctor` compares."""

VERSION = "0.1.0"
