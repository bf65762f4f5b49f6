from lahis_tl.models import load_model
from lahis_tl.corpora import load_corpus
from lahis_tl.gradients import head_gradients
from lahis_tl.scores import score
from lahis_tl.access import tokenizer_of, grid_of
from lahis_tl.masks import *
