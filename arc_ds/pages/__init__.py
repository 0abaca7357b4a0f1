"""Tables, axes and the frame of offline HTML pages. Reports of evaluations and comparisons of runs are such pages."""
