"""Encoding images: preprocessing, the vision graph, and a cache of encoded images."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from promprune.checks import config_from_options, require
from promprune.closing import Closing
from promprune.errors import ConfigError
from promprune.package.agree import check_graph
from promprune.package.manifest import Manifest
from promprune.package.package import Package, read_package
from promprune.runtime.images import ImageProcessor, PreprocessedImage, open_processor
from promprune.runtime.images.encoded import EncodedImage
from promprune.runtime.images.preprocess import load_image
from promprune.runtime.sessions import Session, open_session
from promprune.runtime.sessions.config import RuntimeConfig

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ImageEncoder", "ImageSource", "Images", "PreparedImage", "as_image_list"]

# A file, the bytes of a file, a PIL image, an array [height, width, 3] of uint8, or an encoded image.
ImageSource: TypeAlias = "str | Path | bytes | Image | npt.NDArray[np.uint8] | EncodedImage"
# An image that can be encoded, or is encoded.
PreparedImage: TypeAlias = "EncodedImage | PreprocessedImage"
# One image, or a list of images.
Images: TypeAlias = "ImageSource | Sequence[ImageSource]"


class ImageEncoder(Closing):
    """The vision half of a package, for :class:`VisionLanguagePipeline` and for language models that run elsewhere.

    Thread-safe.

    Attributes:
        manifest: the package's manifest.
        processor: turns pictures into the inputs of a vision graph, and its outputs into encoded images.
        device: device of the graphs: ``"CPU"`` or ``"CUDA"``.
        sessions: the loaded graphs, by name.
    """

    def __init__(
        self, manifest: Manifest, processor: ImageProcessor, sessions: Mapping[str, Session], config: RuntimeConfig
    ) -> None:
        self.manifest = manifest
        self.processor = processor
        self.device = sessions[processor.graphs[0]].device
        self.sessions = sessions
        self._max_pixels = config.max_image_pixels
        self._cache = _ImageCache(config.image_cache_size)

    @classmethod
    def from_package(
        cls,
        path: str | Path,
        **options: Any,
    ) -> Self:
        """Load only the vision graphs of a package.

        Args and errors: as in :meth:`VisionLanguagePipeline.from_package`.
        """
        config = config_from_options(RuntimeConfig, options)
        return cls.open(read_package(Path(path), check_weights=config.check_weights), config)

    @classmethod
    def open(cls, package: Package, config: RuntimeConfig) -> Self:
        """Load the vision graphs of a package.

        Raises:
            ConfigError: the package is ``untrusted``, which only a pipeline can be.
            PackageError: a graph differs from the manifest.
            BackendError: a graph, or the requested provider, cannot be loaded.
        """
        require(not config.untrusted, "untrusted", True, "VisionLanguagePipeline.from_package with it")
        processor = open_processor(package)
        sessions = {name: open_session(package, name, config) for name in processor.graphs}
        for name, session in sessions.items():
            file, expected = package.graph_file(name), processor.expected(name)
            check_graph(file, session.inputs.values(), session.outputs.values(), expected, source="its preprocessing")
        return cls(package.manifest, processor, sessions, config)

    def encode_image(self, image: ImageSource, *, alone: bool = True) -> EncodedImage:
        """Return the kept visual tokens of one image.

        Args:
            image: the image.
            alone: whether it is the only image of its prompt. LLaVA-OneVision sees one of several as a single crop.

        Raises:
            ImageError: it cannot be read.
            BackendError: the vision graph failed, or returned values that are not finite.
        """
        return self.encode(self.preprocess(image, alone=alone))[0]

    def view(self, image: str | Path | bytes | Image | npt.NDArray[np.uint8], *, alone: bool = True) -> Image:
        """Return the part of an image that the model sees, in the size in which it sees it; 8-bit RGB.

        Args:
            image: the image.
            alone: as in :meth:`encode_image`.

        Raises:
            ImageError: it cannot be read.
        """
        return self.processor.view(load_image(image, max_pixels=self._max_pixels), alone=alone)

    def preprocess(self, source: ImageSource, *, alone: bool = True) -> PreparedImage:
        """Read and preprocess one image; an encoded image is returned unchanged.

        Args:
            source: the image.
            alone: as in :meth:`encode_image`.

        Raises:
            ImageError: the image cannot be read.
            ConfigError: it was encoded by a package with other shapes.
        """
        if not isinstance(source, EncodedImage):
            return self.processor.preprocess(load_image(source, max_pixels=self._max_pixels), alone=alone)
        size = self.sessions[self.processor.graphs[0]].outputs["image_features"].shape[-1]
        expected = (self.processor.num_placeholders(source.selection), size)
        if source.image_features.shape != expected:
            raise ConfigError(
                f"received an encoded image of shape {list(source.image_features.shape)}",
                expected=str(list(expected)),
                fix="encode it with this package",
            )
        return source

    def encode(self, image: PreparedImage) -> tuple[EncodedImage, bool]:
        """Return an encoded image, and whether the vision encoder ran for it.

        Raises:
            BackendError: the vision graph failed, or its outputs are not finite.
        """
        if isinstance(image, EncodedImage):
            return image, False
        known = self._cache.get(image.digest)
        if known is not None:
            return known, False
        encoded = self._run(image)
        encoded.image_features.flags.writeable = False
        self._cache.put(image.digest, encoded)
        return encoded, True

    def _run(self, image: PreprocessedImage) -> EncodedImage:
        session = self.sessions[image.graph]
        if not session.copies_on_device:
            return self.processor.postprocess(session.run(image.feeds), image)
        outputs = session.run_keeping(image.feeds, keep=["image_features"])
        features = outputs["image_features"]
        encoded = self.processor.postprocess({name: output.numpy() for name, output in outputs.items()}, image)
        # Postprocessing may have reordered the features, or inserted others.
        unchanged = np.shares_memory(encoded.image_features, features.numpy())
        return replace(encoded, on_device=features) if unchanged and features.shape[0] == 1 else encoded

    @property
    def notes(self) -> tuple[str, ...]:
        """Why the graphs run on their device and in their way, in words."""
        return tuple(dict.fromkeys(note for session in self.sessions.values() for note in session.notes))

    def close(self) -> None:
        """Free the graphs; encoding afterwards raises a BackendError."""
        for session in self.sessions.values():
            session.close()


def as_image_list(images: Images) -> list[ImageSource]:
    """Return a list of images, also for a single image."""
    return list(images) if isinstance(images, (list, tuple)) else [images]  # type: ignore[list-item]


class _ImageCache:
    """The most recently encoded images, by the digest of their pixels."""

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
