"""Hugging Face weights in and out of NeMo 2.0 checkpoints: exact, streaming, without Transformer Engine."""

from typing import TYPE_CHECKING

from nemo_cpt.importing import on_first_use

if TYPE_CHECKING:
    from nemo_cpt.checkpoint.downloading import DownloadReport, download
    from nemo_cpt.checkpoint.exporting import ExportReport, export_hf
    from nemo_cpt.checkpoint.growing import GrowModelReport, grow_model
    from nemo_cpt.checkpoint.importing import ImportReport, import_hf
    from nemo_cpt.checkpoint.merging import MergeReport, merge
    from nemo_cpt.checkpoint.untrained import UntrainedReport, make_untrained
    from nemo_cpt.checkpoint.verification import VerifyReport, verify

_HOMES = {
    "import_hf": "importing",
    "ImportReport": "importing",
    "export_hf": "exporting",
    "ExportReport": "exporting",
    "grow_model": "growing",
    "GrowModelReport": "growing",
    "merge": "merging",
    "MergeReport": "merging",
    "download": "downloading",
    "DownloadReport": "downloading",
    "make_untrained": "untrained",
    "UntrainedReport": "untrained",
    "verify": "verification",
    "VerifyReport": "verification",
}
__all__ = [
    "DownloadReport",
    "ExportReport",
    "GrowModelReport",
    "ImportReport",
    "MergeReport",
    "UntrainedReport",
    "VerifyReport",
    "download",
    "export_hf",
    "grow_model",
    "import_hf",
    "make_untrained",
    "merge",
    "verify",
]
__getattr__, __dir__ = on_first_use(__name__, _HOMES)
