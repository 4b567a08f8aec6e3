VISION = ()
