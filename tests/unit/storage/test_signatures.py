import importlib.util
import io
from pathlib import Path

import pytest
from PIL import Image

from services.storage.domain import HEAD_BYTES, ContentTypeMismatch
from services.storage.signatures import detected_type, require_type

PHOTOS = (
    Path(importlib.util.find_spec("skimage").origin).parent / "data"
)  # found, not imported: only its pictures are here


def encoded(kind: str) -> bytes:
    target = io.BytesIO()
    Image.open(PHOTOS / "rocket.jpg").resize((64, 48)).save(target, kind)
    return target.getvalue()[:HEAD_BYTES]


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [
        ("JPEG", "image/jpeg"), ("PNG", "image/png"), ("GIF", "image/gif"), ("WEBP", "image/webp"),
        ("AVIF", "image/avif"), ("TIFF", "image/tiff"), ("BMP", "image/bmp"), ("PDF", "application/pdf"),
    ],
)  # fmt: skip
def test_what_an_encoder_wrote_is_recognised(kind, content_type):
    assert detected_type(encoded(kind)) == content_type


@pytest.mark.parametrize(
    ("head", "content_type"),
    [
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "image/heic"),
        (b"\x00\x00\x00\x1cftypmif1\x00\x00\x00\x00mif1avifmiaf", "image/avif"),
        (b"\x00\x00\x00\x18ftypisom\x00\x00\x00\x00isomavc1", "application/octet-stream"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- a -->\n<!DOCTYPE svg>\n<svg xmlns="x"></svg>', "image/svg+xml"),
        (b"<html><svg></svg></html>", "text/plain"),
        (b"BM is not always a bitmap", "text/plain"),
        ("naïve".encode().ljust(HEAD_BYTES - 1) + b"\xe2", "text/plain"),  # cut in the middle of a character
        (b"caf\xe9", "application/octet-stream"),
        (b"a\x00b", "application/octet-stream"),
    ],
)
def test_what_is_no_photograph_is_told_apart(head, content_type):
    assert detected_type(head) == content_type


@pytest.mark.parametrize(
    ("name", "declared", "detected"),
    [
        ("a.jpg", "image/jpeg", "image/jpeg"),
        ("a.jpg", "image/jpg", "image/jpeg"),
        ("a.jpg", "", "image/png"),
        ("a.heic", "image/heif", "image/heic"),
        ("a.NEF", "image/x-nikon-nef", "image/tiff"),
        ("a", "application/x-www-form-urlencoded", "image/jpeg"),  # curl's own choice
        ("a.txt", "text/csv; charset=utf-8", "text/plain"),
        ("a.bin", "application/octet-stream", "text/plain"),
    ],
)
def test_bytes_that_are_what_they_were_called_pass(name, declared, detected):
    require_type(name, declared, detected)


@pytest.mark.parametrize(
    ("name", "declared", "detected", "told"),
    [
        ("a", "image/jpeg", "text/plain", "image/jpeg"),
        ("a.png", "image/png", "image/jpeg", "image/png"),
        ("a.JPG", "", "text/plain", "image/jpeg"),
        ("a.svg", "application/octet-stream", "text/plain", "image/svg+xml"),
        ("a", "multipart/form-data; boundary=x", "application/octet-stream", "multipart/form-data"),
        ("a", "text/plain", "image/jpeg", "text/plain"),
        ("a", "application/pdf", "text/plain", "application/pdf"),
    ],
)
def test_bytes_that_are_something_else_are_refused(name, declared, detected, told):
    with pytest.raises(ContentTypeMismatch) as refusal:
        require_type(name, declared, detected)

    assert (refusal.value.code, refusal.value.reason) == ("INVALID_ARGUMENT", "CONTENT_TYPE_MISMATCH")
    assert refusal.value.metadata == {"declared": told, "detected": detected}
