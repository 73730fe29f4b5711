"""Whether faces can be found here: `python -m services.media.worker.faces` ends well if so, and else says why not."""

from services.media.operations import faces

if __name__ == "__main__":
    faces.detector()
