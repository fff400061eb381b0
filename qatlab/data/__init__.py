"""Images, captions and class embeddings: how they are read, checked and handed to training and evaluation."""

from qatlab.data.captions import CaptionShards
from qatlab.data.images import ImageFolderSet, class_index_for
from qatlab.data.module import CaptionModule
from qatlab.data.samples import Captioned, SkipCounter
from qatlab.data.shards import expand_shards
from qatlab.data.texttable import TextTable, load_text_table, save_text_table
from qatlab.data.transforms import BadImage, Preprocess

__all__ = [
    "BadImage",
    "CaptionModule",
    "CaptionShards",
    "Captioned",
    "ImageFolderSet",
    "Preprocess",
    "SkipCounter",
    "TextTable",
    "class_index_for",
    "expand_shards",
    "load_text_table",
    "save_text_table",
]
