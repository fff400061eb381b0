"""The 15 + 4 corruptions of ImageNet-C and CIFAR-C, reproducible from a seed whatever the number of workers."""

from qatlab.data.corruptions.apply import corrupt
from qatlab.data.corruptions.tables import EXTRA, MAIN, TABLES
from qatlab.data.corruptions.transform import ORDERS, Corrupt

__all__ = ["EXTRA", "MAIN", "ORDERS", "TABLES", "Corrupt", "corrupt"]
