"""Does influence choose the right groups to train? The paper's section 5, against an oracle."""
