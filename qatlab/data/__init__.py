"""Images, captions and class embeddings: how they are read, checked and handed to training and evaluation."""

from qatlab.data.captions.batches import CaptionModule
from qatlab.data.captions.locate import expand_shards
from qatlab.data.captions.samples import Captioned, SkipCounter
from qatlab.data.captions.source import CaptionShards
from qatlab.data.captions.uncaptioned import ImageFolder
from qatlab.data.images.folders import class_index_for
from qatlab.data.images.imageset import Files, Layout
from qatlab.data.preprocess import BadImage, Preprocess
from qatlab.data.texttable import TextTable, load_text_table, save_text_table

__all__ = [
    "BadImage",
    "CaptionModule",
    "CaptionShards",
    "Captioned",
    "Files",
    "ImageFolder",
    "Layout",
    "Preprocess",
    "SkipCounter",
    "TextTable",
    "class_index_for",
    "expand_shards",
    "load_text_table",
    "save_text_table",
]
