"""Image files, small ones."""

import io

from PIL import Image


def encoded(image, kind="png", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


PICTURE = Image.new("RGB", (8, 6), (200, 100, 50))
PNG = encoded(PICTURE)


def put(path, data=PNG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
