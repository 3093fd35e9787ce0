"""Which shapes the embedded sampler compiles."""

from jaxgrpo.samplers.shapes import Shape, ShapeBook


def test_shapes_are_few_and_follow_lasting_work():
    book = ShapeBook(row_cost=100.0)
    full = Shape(rows=60, tokens=16, groups=8, group_rows=8, shared=1000, own=100)
    assert book.choose("decode", full) == Shape(64, 16, 8, 8, 1024, 128)
    almost = Shape(rows=50, tokens=16, groups=8, group_rows=7, shared=900, own=90)
    assert book.choose("decode", almost) == Shape(64, 16, 8, 8, 1024, 128)  # close enough for good
    tail = Shape(rows=5, tokens=16, groups=2, group_rows=3, shared=700, own=200)
    assert book.choose("decode", tail) == Shape(8, 16, 2, 4, 768, 256)  # nothing covers 200 own tokens
    few = Shape(rows=2, tokens=16, groups=1, group_rows=2, shared=60, own=10)
    chosen = [book.choose("decode", few) for _ in range(9)]
    assert chosen == [Shape(8, 16, 2, 4, 768, 256)] * 7 + [Shape(4, 16, 1, 4, 64, 64)] * 2  # wasteful, so replaced once it is wanted often
    assert book.compilations == 3
    assert book.choose("extend", few) == Shape(4, 16, 1, 4, 64, 64)
