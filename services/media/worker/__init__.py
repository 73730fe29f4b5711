"""Takes tasks and does them: `python -m services.media.worker`."""
