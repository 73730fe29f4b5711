"""The Python client of Atelier.

    import asyncio
    from atelier.media.v1.media_pb2 import FORMAT_WEBP, Operation, Resize
    from atelier_client import Atelier

    async def main() -> None:
        async with Atelier.connect("http://127.0.0.1:8080") as atelier:
            await atelier.login("ada", "correct horse")
            shrink = Operation(resize=Resize(width=800, format=FORMAT_WEBP))
            result = await atelier.run("photo.jpg", shrink)
            await atelier.download(result.file.file_id, "small.webp")

    asyncio.run(main())

Everything that can go wrong is an `AtelierError`; the tree is drawn in `atelier_client.errors`.
The command is in `atelier_client.command`.
"""

from atelier_client.client import Atelier, Progress, Result
from atelier_client.credentials import Credentials, FileCredentials, MemoryCredentials, Session
from atelier_client.errors import AtelierError
from atelier_client.version import VERSION

__all__ = [
    "VERSION",
    "Atelier",
    "AtelierError",
    "Credentials",
    "FileCredentials",
    "MemoryCredentials",
    "Progress",
    "Result",
    "Session",
]
