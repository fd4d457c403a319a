"""Loggers beside TensorBoard, whose run is the same after every resumption."""

import os
from pathlib import Path
from typing import Any, Optional

from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment

from nemo_cpt.corpus.atomic_files import make_folder, write_whole


class ContinuedMLFlowLogger(MLFlowLogger):
    """Lightning's MLFlowLogger, which goes on in the MLflow run that it noted in a file.

    W&B runs have ids that are chosen ahead (`nemo_cpt.executors.tracking`); MLflow's are the server's.

    Args:
        note: the file with the run's id, in the run's folder.
        run_id: of a run to go on in; the noted one, else a new one, when None.
        **kwargs: see MLFlowLogger.
    """

    def __init__(self, note: str, run_id: Optional[str] = None, **kwargs: Any):  # noqa: UP045  for NeMo-Run's parser
        self._note = Path(note)
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # MLflow 3 refuses folders, its default, without it
        known = self._note.read_text().strip() if self._note.is_file() else None
        super().__init__(run_id=run_id or known, **kwargs)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client, with the run's id noted as soon as there is one."""
        client = super().experiment
        if not self._note.is_file():
            make_folder(self._note.parent)
            write_whole(self._note, self._run_id.encode())  # `run_id` would ask for the client again
        return client
