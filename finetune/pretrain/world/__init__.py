"""The tabletop world: scenes, their pictures and their captions. Everything follows from a seed; no files.

``sample_scenes`` draws scenes and ``siblings`` changes one thing in each (``scenes.py``), ``render`` draws the pictures
(``raycast.py``), ``captions`` says what they show (``captions.py``); ``pictures.py`` is the training set.
"""
