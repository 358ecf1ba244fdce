"""Rows of the AdamW kernel's table are used again for the same tensors, and never for others."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from chunkft.kernels import adamw_table
from chunkft.kernels.adamw import checked_pieces
from chunkft.kernels.adamw_table import (
    DECAY,
    FIELDS,
    GRAD,
    HEADER,
    LR,
    PARAM,
    SEED,
    STEP,
    WIDE,
    Scalars,
    Tables,
    Tile,
)

TILE = Tile(64, 2, 4)
BETAS = (0.9, 0.999)


class Call:
    """Tensors of three slices and a place to keep their rows; memory of the first parameter has room to spare."""

    def __init__(self, tables=None):
        self.tables = Tables() if tables is None else tables
        self.memory = torch.randn(4096)
        self.params = [self.memory[:96].view(12, 8), torch.randn(33), torch.randn(0, 4)]
        self.moments = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.extras = [None] * 3
        self.counters = [torch.zeros(()) for _ in self.params]
        self.grads = [torch.randn_like(p) for p in self.params]
        self.scalars = Scalars([1.0, 2.0, 3.0], [0.1, 0.2, 0.3], [0.0, 0.5, 0.5], [7, 8, 9])

    @property
    def columns(self):
        return self.params, *self.moments, self.extras, self.counters

    def find(self):
        return self.tables.find(("call",), self.columns, self.grads)

    def keep(self):
        master = "none" if self.extras[0] is None else "fp32"
        pieces = checked_pieces(self.columns, self.grads, self.scalars, master)
        self.tables.keep(("call",), self.columns, self.grads, adamw_table.batches_of(pieces, TILE))

    def rows(self, betas=BETAS):
        (batch,) = self.find()
        content, members = batch.fill(self.grads, self.scalars, betas)
        assert [grad.data_ptr() for grad in members] == [grad.data_ptr() for grad in self.grads[:2]]
        return content.numpy()[batch.slots + HEADER :].reshape(-1, FIELDS)


@pytest.fixture
def call():
    made = Call()
    assert made.find() is None
    made.keep()
    return made


def floats(rows, field):
    return rows.view(np.float64)[:, field].tolist()


def test_the_next_step_finds_the_rows_wherever_its_gradients_are(call):
    first = call.find()
    call.grads = [grad.clone() for grad in call.grads]
    assert call.find() is first
    rows = call.rows()
    assert rows[:, GRAD].tolist() == [grad.data_ptr() for grad in call.grads[:2]]
    assert rows[:, PARAM].tolist() == [param.data_ptr() for param in call.params[:2]]


def test_numbers_are_those_of_the_call(call):
    call.rows()
    call.scalars = Scalars([5.0, math.nan, 1.0], [0.3, 0.7, 0.0], [0.5, 0.25, 0.0], [2**62, 1, 2])
    rows = call.rows(betas=(0.5, 0.0))
    assert floats(rows, STEP)[0] == 5.0
    assert math.isnan(floats(rows, STEP)[1])
    assert floats(rows, LR) == [0.3, 0.7]
    assert floats(rows, DECAY) == [1 - 0.3 * 0.5, 1 - 0.7 * 0.25]
    assert rows[:, SEED].tolist() == [2**62, 1]
    (batch,) = call.find()
    header = batch.content.view(np.float64)[batch.slots : batch.slots + HEADER]
    assert header.tolist() == [math.log(0.5), -math.inf]


def test_a_table_on_its_way_is_not_written_into(call):
    (batch,) = call.find()
    before, _ = batch.fill(call.grads, call.scalars, BETAS)
    kept = before.clone()
    batch.fill([grad.clone() for grad in call.grads], call.scalars._replace(steps=[9.0] * 3), BETAS)
    assert torch.equal(before, kept)


def test_gradients_that_are_not_aligned_are_read_element_by_element_for_that_step_only(call):
    aligned = call.grads
    assert call.rows()[0, WIDE] == 1
    call.grads = [torch.randn(97)[1:].view(12, 8), *aligned[1:]]
    assert call.rows()[0, WIDE] == 0
    call.grads = aligned
    assert call.rows()[0, WIDE] == 1


def same_address_other_shape(call):
    call.params[0] = call.memory[:96].view(8, 12)


def same_address_other_strides(call):
    call.params[0] = call.memory[:192].view(12, 16)[:, :8]


def same_address_other_dtype(call):
    call.params[0] = call.memory[:48].view(torch.bfloat16).view(12, 8)


def another_parameter(call):
    call.params[0] = call.params[0].clone()


def other_order(call):
    call.params[:2], call.grads[:2] = call.params[1::-1], call.grads[1::-1]


def moments_elsewhere(call):
    call.moments[1][1] = call.moments[1][1].clone()


def moments_of_another_dtype(call):
    call.moments[0][0] = call.moments[0][0].bfloat16()


def counter_elsewhere(call):
    call.counters[1] = call.counters[1].clone()


def a_master(call):
    call.extras[1] = torch.zeros(33)


def gradients_of_another_dtype(call):
    call.grads[1] = call.grads[1].bfloat16()


def gradients_of_another_shape(call):
    call.grads[1] = torch.randn(3, 11)


def resized_in_place(call):
    call.params[1].resize_(11)


CHANGES = (
    same_address_other_shape,
    same_address_other_strides,
    same_address_other_dtype,
    another_parameter,
    other_order,
    moments_elsewhere,
    moments_of_another_dtype,
    counter_elsewhere,
    a_master,
    gradients_of_another_dtype,
    gradients_of_another_shape,
    resized_in_place,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_tensors_find_nothing(call, change):
    change(call)
    assert call.find() is None


def test_what_was_not_used_for_longest_makes_room():
    tables = Tables(kept=7)  # three of two slices and one more each are too many
    calls = [Call(tables) for _ in range(3)]
    for number, call in enumerate(calls[:2]):
        pieces = checked_pieces(call.columns, call.grads, call.scalars, "none")
        tables.keep((number,), call.columns, call.grads, adamw_table.batches_of(pieces, TILE))
    assert tables.find((0,), calls[0].columns, calls[0].grads) is not None
    calls[2].keep()
    assert tables.find((0,), calls[0].columns, calls[0].grads) is not None
    assert tables.find((1,), calls[1].columns, calls[1].grads) is None
    assert len(tables) == 2
    calls[2].keep()  # in place of itself
    assert len(tables) == 2


def test_no_tensor_is_held_alive():
    tables = Tables()
    made = Call(tables)
    made.keep()
    made.rows()
    watched = [weakref.ref(t) for t in (*made.params, *made.moments[0], *made.counters, *made.grads)]
    del made
    gc.collect()
    assert len(tables) == 1
    assert all(ref() is None for ref in watched)
