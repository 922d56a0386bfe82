"""From a scan and a bundle to masks, volumes, probabilities and a ledger."""

from medseg.predict.network import load_network
from medseg.predict.predictor import Prediction, Predictor, lung_view, view_of
from medseg.predict.windows import segment_array

__all__ = ["Prediction", "Predictor", "load_network", "lung_view", "segment_array", "view_of"]
