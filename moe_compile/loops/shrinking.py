"""x"""
def shrink(f): return False
