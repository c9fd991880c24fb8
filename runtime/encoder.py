"""From an image to its kept visual tokens: preprocessing, the vision graph, and a memory of what it returned."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeAlias, Unpack

import numpy as np
import numpy.typing as npt

from promprune.errors import ConfigError
from promprune.package import Manifest, read_manifest
from promprune.runtime.config import RuntimeConfig, RuntimeOptions
from promprune.runtime.loading import open_vision_encoder
from promprune.runtime.preprocess import ImagePreprocessor, load_image
from promprune.runtime.results import EncodedImage, encoded_image_of
from promprune.runtime.sessions import Session

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageEncoder", "ImageSource", "PreparedImage"]

# A file, its encoded bytes, a PIL image, an array [height, width, 3] of uint8, or an image encoded before.
ImageSource: TypeAlias = "str | Path | bytes | Image | npt.NDArray[np.uint8] | EncodedImage"


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image that is ready for the vision encoder."""

    pixel_values: npt.NDArray[np.float32]  # [1, 3, height, width]
    digest: bytes  # SHA-256 of its 8-bit pixels


class ImageEncoder:
    """The vision half of a package: for language models elsewhere, and inside :class:`VisionLanguagePipeline`.

    Safe to use from several threads at once.

    Attributes:
        manifest: what the package says of itself.
        preprocessor: from pictures to ``pixel_values``.
        device: where the graph runs: ``"CPU"`` or ``"CUDA"``.
    """

    def __init__(self, folder: Path, manifest: Manifest, session: Session, config: RuntimeConfig) -> None:
        image = manifest.image
        self.manifest = manifest
        self.preprocessor = ImagePreprocessor.from_file(
            folder / "preprocessor_config.json", height=image.height, width=image.width
        )
        self.device = session.device
        self._session = session
        self._cache = _ImageCache(config.image_cache_size)

    @classmethod
    def from_package(
        cls,
        path: str | Path,
        **options: Unpack[RuntimeOptions],
    ) -> Self:
        """Load the vision encoder of a package, and nothing else of it.

        Args and errors: as in :meth:`VisionLanguagePipeline.from_package`.
        """
        config = RuntimeConfig(**options)
        folder = Path(path)
        manifest = read_manifest(folder, check_weights=config.check_weights)
        return cls(folder, manifest, open_vision_encoder(folder, manifest, config), config)

    def encode_image(self, image: ImageSource) -> EncodedImage:
        """Return the kept visual tokens of one image.

        Raises:
            ImageError: it cannot be read.
            BackendError: the vision graph failed, or returned something that is not a number.
        """
        return self.encode(self.prepare(image))[0]

    def view(self, image: str | Path | bytes | Image | npt.NDArray[np.uint8]) -> Image:
        """Return the part of an image that the model sees, in the size in which it sees it; 8-bit RGB.

        Raises:
            ImageError: it cannot be read.
        """
        return self.preprocessor.crop(load_image(image))

    def prepare(self, source: ImageSource) -> EncodedImage | PreparedImage:
        """Read and preprocess one image; one that was encoded by this package before is returned as it is.

        Raises:
            ImageError: it cannot be read.
            ConfigError: it was encoded by a package of another shape.
        """
        if not isinstance(source, EncodedImage):
            crop = self.view(source)
            return PreparedImage(self.preprocessor.pixel_values(crop), hashlib.sha256(crop.tobytes()).digest())
        expected = self._session.outputs["image_features"].shape[1:]
        if source.image_features.shape != expected:
            raise ConfigError(
                f"received an encoded image of shape {list(source.image_features.shape)}",
                expected=f"{list(expected)}",
                fix="encode it with this package",
            )
        return source

    def encode(self, image: EncodedImage | PreparedImage) -> tuple[EncodedImage, bool]:
        """Return an encoded image, and whether the vision encoder had to run for it.

        Raises:
            BackendError: the vision graph failed, or returned something that is not a number.
        """
        if isinstance(image, EncodedImage):
            return image, False
        known = self._cache.get(image.digest)
        if known is not None:
            return known, False
        pixel_values = image.pixel_values.astype(self._session.inputs["pixel_values"].dtype, copy=False)
        encoded = encoded_image_of(self._session.run({"pixel_values": pixel_values}), self.manifest.selection)
        self._cache.put(image.digest, encoded)
        return encoded, True

    def close(self) -> None:
        """Free the graph; encoding afterwards is a BackendError."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _ImageCache:
    """The images encoded last, by the digest of their pixels."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._images: OrderedDict[bytes, EncodedImage] = OrderedDict()

    def get(self, digest: bytes) -> EncodedImage | None:
        with self._lock:
            if digest in self._images:
                self._images.move_to_end(digest)
            return self._images.get(digest)

    def put(self, digest: bytes, image: EncodedImage) -> None:
        with self._lock:
            self._images[digest] = image
            self._images.move_to_end(digest)
            while len(self._images) > self._size:
                self._images.popitem(last=False)
