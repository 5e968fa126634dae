"""The cycle count of benchmarks/tpu_kernels.py, on schedules small enough to count by hand."""

from pathlib import Path

from benchmarks import tpu_kernels

SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = smov.u32 0  ;;  %s2_s1 = smov.u32 0 } /* entry bundle */
   0x1 LB: > { %s10_s0 = sadd.s32 1, %s9_s0 } /* Start region 7 :: Start region 3 */
   0x2   : > { %p5_p1 = scmp.ge.s32.totalorder %s10_s0, 6 /* loop exit test */ }
   0x3   : > { %9 = sbr.rel (%p77_p0) target = $region20 }
   0x4   :  {}
   0x5 LB: >> { %s21_s2 = sadd.s32 3, %s20_s2 } /* Start region 8 */
   0x6   : >> { %p6_p2 = scmp.ge.s32.totalorder (%p77_p0), %s21_s2, 99  ;;  %v1_v0 = vadd.f32 %v1_v0, %v1_v0 }
   0x7   : >> { %11 = sbr.rel (!%p6_p2) target = $region8 }
   0x8   :  {}
   0x9   :  {}
   0xa   :  {}
   0xb   :  {}
   0xc PF: > { %12 = sbr.rel (!%p5_p1) target = $region7 }
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
  0x10   :  {}
  0x11   :  { %13 = vst [vmem:[%s3]] %v1_v0 }
"""

HLO = """HloModule m

%body.1 (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %fusion.2 = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
}

%cond.1 (q: (s32[], f32[8])) -> pred[] {
  %c = s32[]{:T(128)} constant(99)
  ROOT %lt = pred[] compare(%c, %c), direction=LT
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %while.3 = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body.1
}
"""


def test_bundles_count_as_often_as_their_loops_run() -> None:
    inner, outer_alone, straight = 7, 9, 2
    assert tpu_kernels.schedule_cycles(SCHEDULE) == straight + 6 * (outer_alone + 33 * inner)


def test_loops_around_kernels_count_too(tmp_path: Path) -> None:
    assert tpu_kernels.loop_counts(HLO)["fusion.2"] == 99
    files = [tmp_path / f"123-fusion.{i}-66-final_bundles.txt" for i in (1, 2)]
    for file in files:
        file.write_text("     0   :  { %s1_s0 = smov.u32 0 }\n   0x1   :  {}\n")
    assert tpu_kernels.program_cycles(HLO, files) == 2 + 99 * 2
