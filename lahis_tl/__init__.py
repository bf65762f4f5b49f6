from lahis_tl.models import load_model
