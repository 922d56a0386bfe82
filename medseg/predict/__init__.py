"""From a scan and a bundle to masks, volumes, probabilities and a ledger."""

from medseg.predict.predictor import Prediction, Predictor, load_network
from medseg.predict.windows import segment_array

__all__ = ["Prediction", "Predictor", "load_network", "segment_array"]
