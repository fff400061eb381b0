"""The 15 + 4 corruptions of ImageNet-C and CIFAR-C, reproducible from a seed with any number of workers."""

from qatlab.data.corruptions.apply import corrupt
from qatlab.data.corruptions.tables import TABLES
from qatlab.data.corruptions.transform import ORDERS, Corrupt

__all__ = ["ORDERS", "TABLES", "Corrupt", "corrupt"]
