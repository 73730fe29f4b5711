"""A PDF of one page that is one picture (ISO 32000-1). docs/decisions/0024: why no library writes it."""

from __future__ import annotations

POINTS_A_PIXEL = 72 / 96  # a pixel of CSS; the longest side allowed makes 12,288 points, of 14,400 that readers take


def page(jpeg: bytes, width: int, height: int, bands: int) -> bytes:
    """Return a PDF that shows a JPEG.

    Args:
        jpeg: the stream, which goes in as it is.
        width: its own, pixels.
        height: its own, pixels.
        bands: 1 for grey, 3 for sRGB.
    """
    across, down = f"{width * POINTS_A_PIXEL:.2f}", f"{height * POINTS_A_PIXEL:.2f}"
    drawing = f"{across} 0 0 {down} 0 0 cm /Image Do".encode()
    picture = (
        f"/Type /XObject /Subtype /Image /Width {width} /Height {height} /BitsPerComponent 8 /Filter /DCTDecode "
        f"/ColorSpace /{'DeviceGray' if bands == 1 else 'DeviceRGB'} /Length {len(jpeg)}"
    )
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 {across} {down}] /Contents 4 0 R "
        "/Resources << /XObject << /Image 5 0 R >> >> >>".encode(),
        b"<< /Length %d >>\nstream\n%b\nendstream" % (len(drawing), drawing),
        b"<< %b >>\nstream\n%b\nendstream" % (picture.encode(), jpeg),
    ]
    written = bytearray(b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n")  # the second line says that it is no text: 7.5.2
    places = []
    for number, content in enumerate(objects, 1):
        places.append(len(written))
        written += b"%d 0 obj\n%b\nendobj\n" % (number, content)
    table = len(written)
    written += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    written += b"".join(b"%010d 00000 n \n" % place for place in places)
    written += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, table)
    return bytes(written)
