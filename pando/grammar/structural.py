"""placeholder"""
def structural_lark(spec, limits):
    raise NotImplementedError
