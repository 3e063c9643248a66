"""Images in and out, and what turns them into colour tokens: import the names from here.

``clusters``: the palette. ``processor``: images to tokens and back, with ``settings`` checked. ``reading``,
``writing``: pictures from and to files. ``folders``: which files are pictures.
May use: ops and the ground; alone fits clusters with scikit-learn.
"""

from igpt_fast.image.clusters import dequantize, fit_clusters, load_clusters, quantize, save_clusters
from igpt_fast.image.processor import BatchFeature, ImageGPTImageProcessor
from igpt_fast.image.reading import MAX_PIXELS, center_crop, open_image, resize, to_pil, to_rgb
from igpt_fast.image.writing import check_animation, image_grid, save_animation, save_image

__all__ = [
    "MAX_PIXELS",
    "BatchFeature",
    "ImageGPTImageProcessor",
    "center_crop",
    "check_animation",
    "dequantize",
    "fit_clusters",
    "image_grid",
    "load_clusters",
    "open_image",
    "quantize",
    "resize",
    "save_animation",
    "save_clusters",
    "save_image",
    "to_pil",
    "to_rgb",
]
