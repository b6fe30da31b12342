"""Finding the images that cannot be decoded before training meets them."""

from __future__ import annotations

import logging

from pfedsecure.data.dataset import ImageSet
from pfedsecure.errors import DataError

logger = logging.getLogger("pfedsecure.data")


def verify_images(image_set: ImageSet, *, strict: bool) -> ImageSet:
    """The images of `image_set` that can be decoded.

    Every image is decoded in full: a truncated file opens like a whole one. An image that cannot be decoded is named
    in a warning and left out; with `strict` it raises DataError. So does a set of which nothing remains.
    """
    readable = []
    for index in range(len(image_set)):
        try:
            image_set.image(index)
        except DataError as error:
            if strict:
                raise
            logger.warning("%s (left out)", error, extra={"private": True})
        else:
            readable.append(index)
    if not readable:
        raise DataError(f"none of the {len(image_set)} images can be read; check the files that the warnings name")
    return image_set if len(readable) == len(image_set) else image_set.subset(readable)
