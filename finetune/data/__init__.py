"""From manifests to batches: manifest → windows → Clip → Sample → Batch."""
