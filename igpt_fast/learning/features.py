"""``ImageGPTFeatures``: a network as a transformer of scikit-learn, images in, features out."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from igpt_fast.checks import whole_number
from igpt_fast.image import ImageGPTImageProcessor, center_crop, open_image, resize, to_pil
from igpt_fast.learning.extraction import check_masks, check_tokens, collect, load_network

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError('ImageGPTFeatures needs scikit-learn: pip install "igpt_fast[train]"') from error


class ImageGPTFeatures(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """The mean over positions of one layer, as the paper probes it; for
    ``make_pipeline(ImageGPTFeatures("runs/train/model", 4), StandardScaler(), LogisticRegression())``.

    ``fit`` learns nothing: it loads what ``model`` names. A clone shares the model.

    Args:
        model: A folder or a hub name, or one of the model classes' instances.
        layer: The paper's number, 1..L; 0 are the embeddings.
        sos: Feed SOS, as a causal model was trained.
        bands: Horizontal bands, whose means stand side by side.
        masks: Of a bidirectional model: how many masks each image is seen under, whose mean it is; ``None``: 5.
        processor: Colours and size, for images that are not tokens yet; ``None``: the one beside a model that is
            named, and without one tokens alone are taken.
        batch_size: Images that are computed together.
        device: Where a model that is named is put; ``None`` takes ``cuda`` where torch has it.

    Attributes:
        model_: The network.
        n_features_in_: T, the tokens of an image.
    """

    def __init__(
        self,
        model: Any,
        layer: int,
        sos: bool = True,
        *,
        bands: int = 1,
        masks: int | None = None,
        processor: Any = None,
        batch_size: int = 64,
        device: Any = None,
    ) -> None:
        self.model = model
        self.layer = layer
        self.sos = sos
        self.bands = bands
        self.masks = masks
        self.processor = processor
        self.batch_size = batch_size
        self.device = device

    def __sklearn_clone__(self) -> ImageGPTFeatures:
        return type(self)(**self.get_params(deep=False))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.categorical = True
        tags.input_tags.positive_only = True
        tags.input_tags.three_d_array = True
        tags.transformer_tags.preserves_dtype = []
        return tags

    def fit(self, X: Any, y: Any = None) -> ImageGPTFeatures:
        """Loads the model, and looks at the images.

        Args:
            X: As of ``transform``.
            y: Ignored.

        Raises:
            FileNotFoundError, TypeError, ValueError: No such model, layer, or images.
        """
        self.model_, self.processor_ = self._load()
        whole_number("layer", self.layer, 0, self.model_.config.n_layer)
        check_masks(self.masks, self.model_.config)
        self._tokens(X, reset=True)
        self._n_features_out = whole_number("bands", self.bands) * self.model_.config.n_embd
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The features of images: (N, bands * n_embd) float32.

        Args:
            X: (N, T) tokens; or (N, H, W, 3) uint8 arrays, or a list of images of any kind that the processor takes,
                paths of files among them, whose middle is cut out in the model's aspect.
        """
        check_is_fitted(self, "model_")
        tokens = self._tokens(X, reset=False)
        how: dict[str, Any] = {"sos": self.sos, "bands": self.bands, "masks": self.masks}
        how["batch_size"] = whole_number("batch_size", self.batch_size)
        return collect(self.model_, tokens, [self.layer], **how)[:, 0]

    def _load(self) -> tuple[Any, ImageGPTImageProcessor | None]:
        if not isinstance(self.model, str | os.PathLike):
            if not hasattr(self.model, "forward_intermediates"):
                raise TypeError(f"model is a {type(self.model).__name__}; want a model, or the name of one")
            return self.model.base_model, self.processor
        import torch

        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = load_network(os.fspath(self.model), device)
        if self.processor is not None:
            return model, self.processor
        try:
            return model, ImageGPTImageProcessor.from_pretrained(self.model)
        except FileNotFoundError:
            return model, None

    def _tokens(self, images: Any, reset: bool) -> Tensor:
        """(N, T) integers."""
        if _are_pictures(images):
            if self.processor_ is None:
                raise ValueError("ImageGPTFeatures: pictures need a processor; there is none beside the model")
            last = "channels_last" if isinstance(images, np.ndarray | Tensor) else None
            images = np.concatenate([_tokens_of(image, self.processor_, last) for image in images])
        array = validate_data(self, images, reset=reset, dtype="numeric", ensure_min_samples=1)
        whole = array if array.dtype.kind in "iu" else array.astype(np.int64)
        if not np.array_equal(whole, array):
            raise ValueError("ImageGPTFeatures: tokens must be integers; pictures are (N, H, W, 3) uint8, or a list")
        if whole.min() < 0:
            raise ValueError("Negative values in data passed to ImageGPTFeatures: tokens are the numbers of colours")
        return check_tokens(whole, self.model_.config, shorter=True)


def _are_pictures(images: Any) -> bool:
    if isinstance(images, np.ndarray | Tensor):
        return images.ndim == 4
    first = images[0] if isinstance(images, list | tuple) and images else None
    if isinstance(first, np.ndarray | Tensor):
        return first.ndim >= 2
    return isinstance(first, Image.Image | str | os.PathLike)


def _tokens_of(image: Any, processor: ImageGPTImageProcessor, layout: str | None) -> np.ndarray:
    """(1, T) of one picture."""
    named = isinstance(image, str | os.PathLike)
    picture = open_image(image) if named else to_pil(image, input_data_format=layout)
    height, width = processor.height, processor.width
    square = resize(center_crop(picture, width / height), width, height)
    return processor(square, return_tensors="np")["input_ids"]
