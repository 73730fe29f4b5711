"""The services. Each stands alone: they meet through generated stubs only."""
