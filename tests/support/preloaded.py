"""Imported by the server that the tests' jobs are forked from: NeMo, once for all of them."""

import gc

from nemo_cpt.importing import uncollected

with uncollected():
    import nemo_cpt.recipes.tiny  # noqa: F401
gc.freeze()  # a collection in a job would walk over all this, and copy the pages that it shares
