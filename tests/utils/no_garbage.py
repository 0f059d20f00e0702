"""Once imported, nobody looks for garbage: what imports much else spends a fifth of its time so."""

import gc

gc.disable()
