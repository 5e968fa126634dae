"""Collectives by axis, and bytes to memory, of texts small enough to count by hand."""

import numpy as np
import pytest

from moe.plan import traffic

MESH = {"data": 2, "fsdp": 1, "expert": 2, "tensor": 2}

HLO = """HloModule m

%all-reduce-scatter (input: f32[8,4]) -> f32[4,4] {
  %input = f32[8,4]{1,0} parameter(0)
  %reduce = f32[8,4]{1,0} all-reduce(%input), channel_id=5, replica_groups=[4,2]<=[4,2]T(0,1), to_apply=%sum
  ROOT %cut = f32[4,4]{1,0} dynamic-slice(%reduce, %zero, %zero), dynamic_slice_sizes={4,4}
}

%start (p: f32[3]) -> f32[6] {
  ROOT %gather.1 = f32[6]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(0,1)) {'b'}, dimensions={0}
}

%async_collective_fusion.2 (p: f32[3]) -> f32[6] {
  ROOT %gather.2 = f32[6]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(0,1)) {'b'}, dimensions={0}
}

%end (p: f32[3]) -> f32[6] {
  ROOT %gather.3 = f32[6]{0} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2], device_ids=([4,2]T(0,1)) {'b'}, dimensions={0}
}

%part (whole: f32[100,4], index: s32[]) -> f32[1,4] {
  %whole = f32[100,4]{1,0} parameter(0)
  %index = s32[] parameter(1)
  ROOT %row = f32[1,4]{1,0} dynamic-slice(%whole, %index, %zero), dynamic_slice_sizes={1,4}
}

%put (stack: f32[100,4], new: f32[1,4], index: s32[]) -> f32[100,4] {
  %stack = f32[100,4]{1,0} parameter(0)
  %new = f32[1,4]{1,0} parameter(1)
  %at = s32[] parameter(2)
  ROOT %put.1 = f32[100,4]{1,0} dynamic-update-slice(%stack, %new, %at, %zero)
}

ENTRY %main (x: f32[3]) -> f32[3] {
  %x = f32[3]{0} parameter(0)
  %stacked = f32[100,4]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %async-collective-start = (f32[3]{0}, f32[6]{0}) fusion(%x), kind=kCustom, calls=%start
  %fusion.7 = (f32[3]{0}, f32[6]{0}) fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %async-collective-done = f32[6]{0} fusion(%x), kind=kCustom, calls=%end
  %scatter = f32[4,4]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter
  %a2a = bf16[8]{0} all-to-all(%y), channel_id=2, replica_groups=[4,2]<=[2,2,2]T(0,2,1)
  %all = f32[5]{0} all-reduce(%y), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%sum
  %pairs = f32[7]{0} collective-permute(%y), channel_id=4, source_target_pairs={{0,4},{4,0}}
}
"""  # noqa: E501


def test_collectives_are_counted_once_by_kind_and_axis() -> None:
    found = {one.kind: one for one in traffic.transfers(HLO, MESH)}
    assert {kind: (one.axes, one.devices, one.times) for kind, one in found.items()} == {
        "all-gather": (("tensor",), 2, 1),
        "reduce-scatter": (("tensor",), 2, 1),
        "all-to-all": (("expert",), 2, 1),
        "all-reduce": (("data", "expert", "tensor"), 8, 1),
        "collective-permute": (("data",), 2, 1),
    }
    assert {kind: one.bytes for kind, one in found.items()} == {
        "all-gather": 24 / 2,
        "reduce-scatter": 128 / 2,
        "all-to-all": 16 / 2,
        "all-reduce": 2 * 20 * 7 / 8,
        "collective-permute": 28,
    }


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups={}", []),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=([2,2]T(1,0)) {'c'}", [0, 2]),
        ("source_target_pairs={{0,1},{1,2}}", [0, 1, 2]),
    ],
)
def test_groups_are_read_in_every_way_they_are_written(text: str, members: list[int]) -> None:
    np.testing.assert_array_equal(traffic.first_group(f"f32[2] all-reduce(%x), {text}, use"), members)


def test_groups_written_in_another_way_are_an_error() -> None:
    with pytest.raises(ValueError, match="the groups of a collective can't be read"):
        traffic.first_group("f32[2] all-reduce(%x), replica_groups=new")


def test_loops_count_and_what_starts_returns_its_operands() -> None:
    hlo = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %a2a = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) all-to-all(%x, %y), channel_id=1, replica_groups={{0,1},{2,3},{4,5},{6,7}}
}

%cond (q: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  ROOT %lt = pred[] compare(%limit, %limit), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %ragged = ((f32[6]{0}, f32[9]{0}), f32[9]{0}) ragged-all-to-all-start(%x, %x, %x), replica_groups={{0,2},{1,3}}
  %gather = (f32[4]{0}, f32[8]{0}) all-gather-start(%x), replica_groups={{0,4},{1,5}}
  %alone = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}
  ROOT %while = (s32[], f32[8]{0}) while(%t), condition=%cond, body=%body
}
"""
    found = [(one.kind, one.axes, one.bytes, one.times) for one in traffic.transfers(hlo, MESH)]
    assert found == [
        ("all-to-all", ("tensor",), 7 * 128 / 2, 7),
        ("all-gather", ("data",), 32 / 2, 1),
        ("ragged-all-to-all", ("expert",), 24 / 2, 1),
    ]


def test_bytes_are_those_of_the_parts_that_are_touched() -> None:
    head = HLO.partition("ENTRY")[0]
    body = """ENTRY %main (x: f32[3]) -> f32[3] {
  %stacked = f32[100,4]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %kept = f32[50,4]{1,0:T(8,128)S(1)} parameter(2)
  %five = f32[5]{0} parameter(3)
  %one = f32[1,4]{1,0} fusion(%stacked, %i), kind=kLoop, calls=%part
  %two = f32[100,4]{1,0} fusion(%stacked, %one, %i), kind=kLoop, calls=%put
  %three = f32[100,4]{1,0} add(%stacked, %kept)
  %nine = (f32[100,4]{1,0}, f32[6]{0}, f32[5]{0}) fusion(%stacked, %five), calls=%async_collective_fusion.3
}
"""
    through = """
%async_collective_fusion.3 (p: f32[100,4], q: f32[5]) -> (f32[100,4], f32[6], f32[5]) {
  %p = f32[100,4]{1,0} parameter(0)
  %q = f32[5]{0} parameter(1)
  %gather.9 = f32[6]{0} all-gather(%p), channel_id=9, replica_groups={}, dimensions={0}
  %work = f32[5]{0} negate(%q)
  ROOT %all = (f32[100,4]{1,0}, f32[6]{0}, f32[5]{0}) tuple(%p, %gather.9, %work)
}

"""
    # A row read and written, and an index; a row read and put in its place, and an index; two whole arrays; of what
    # overlaps with a collective its own part alone.
    assert traffic.moved_bytes(head + through + body) == (16 + 16 + 4) + (16 + 16 + 4) + 2 * 1600 + 2 * 20


BETWEEN = """HloModule m

ENTRY %main (x: f32[3]) -> f32[3] {
  %x = f32[8,128]{1,0} parameter(0)
  %after = token[] after-all()
  %send = (f32[8,128]{1,0}, u32[], token[]) send(%x, %after), channel_id=3, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[8,128]{1,0}, u32[], token[]) recv(%after), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv-done = (f32[8,128]{1,0}, token[]) recv-done(%recv), channel_id=2, is_host_transfer=true
  %other = (bf16[8]{0}, u32[], token[]) recv(%after), channel_id=4, is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ONE_TO_ONE"}
}
"""  # noqa: E501


def test_what_goes_between_slices_is_counted_where_it_arrives() -> None:
    found = traffic.transfers(BETWEEN, {"dcn": 4, "data": 2})
    assert [(one.kind, one.axes, one.devices, one.times) for one in found] == [
        ("all-reduce", ("dcn",), 4, 1.0),
        ("collective-permute", ("dcn",), 4, 1.0),
    ]
    assert [one.bytes for one in found] == [2 * 3 / 4 * 8 * 128 * 4, 8 * 2]
