"""How likely a text is: exact for an ARM, estimated for an MDM."""
