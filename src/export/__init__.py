"""A trained model in the forms that servers load, each checked before it is kept."""
