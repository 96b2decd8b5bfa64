"""Problems whose groups of parameters have different units, and rules that find their rates."""
