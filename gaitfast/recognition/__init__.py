"""What the transfer stage trains: the losses over embeddings and logits."""

from gaitfast.recognition.losses import IdentityLoss, TripletLoss, identity_loss, triplet_loss

__all__ = ["IdentityLoss", "TripletLoss", "identity_loss", "triplet_loss"]
