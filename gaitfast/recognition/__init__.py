"""What the transfer stage trains: the losses over embeddings and logits."""

from gaitfast.recognition.losses import IdentityLoss, TripletLoss, identity_loss, triplet_loss
from gaitfast.recognition.objective import RecognitionObjective

__all__ = ["IdentityLoss", "RecognitionObjective", "TripletLoss", "identity_loss", "triplet_loss"]
