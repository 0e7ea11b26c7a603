"""Matrix kernels of the streaming network for this CPU, generated as LLVM code when a network is loaded.

A row is a window of `kernel` consecutive frames of one channel, adjacent in memory, so a layer is a matrix product
without copying windows together. A tile takes a few rows, wherever they lie, against the whole weight panel and
keeps all sums in registers; every row is summed in the same order whatever tile it is in, so results do not depend
on how a stream was cut. bfloat16 multiplies with float32 sums where the CPU has AVX512-BF16, float32 elsewhere.

Layout of the weights: 16 outputs make a vector; up to DOT_OUTPUTS left over are dot products along the window.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import numpy as np

LANES = 16
DOT_OUTPUTS = 4
BFLOAT16, FLOAT32 = "bfloat16", "float32"
_ALIGN = 64


@cache
def _features() -> dict[str, bool]:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return dict(binding.get_host_cpu_features())


def best_precision() -> str:
    """bfloat16 where this CPU multiplies it, float32 elsewhere."""
    return BFLOAT16 if _features().get("avx512bf16") else FLOAT32


def check_precision(precision: str) -> str:
    """ "auto" resolved; ValueError for what this CPU cannot do."""
    if precision == "auto":
        return best_precision()
    if precision not in (BFLOAT16, FLOAT32):
        raise ValueError(f"precision {precision!r} is not known; choose auto, {BFLOAT16} or {FLOAT32}")
    if precision == BFLOAT16 and best_precision() != BFLOAT16:
        raise ValueError(f"this CPU has no bfloat16 products (AVX512-BF16); choose {FLOAT32} or auto")
    return precision


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16 bits (uint16), to nearest even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def padded_width(width: int) -> int:
    """Values per stored frame of a layer: whole vectors, or whole vectors and a few dot outputs (even)."""
    over = width % LANES
    if over == 0 or (width > LANES and over <= DOT_OUTPUTS and over % 2 == 0):
        return width
    return -(-width // LANES) * LANES


def aligned(shape: tuple[int, ...], dtype: type | np.dtype, spare_bytes: int = 4096) -> np.ndarray:
    """Zeros on a 64-byte boundary with readable bytes behind them."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.zeros(size + spare_bytes + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size].view(dtype).reshape(shape)


@dataclass(frozen=True)
class Weights:
    """One layer as a kernel reads it: vector panel, dot rows, bias; and the shape it was made for."""

    panel: np.ndarray
    dots: np.ndarray
    bias: np.ndarray


@dataclass(frozen=True)
class Kernel:
    """A compiled layer: `address` of void f(in, in_offsets, panel, dots, bias, out, out_offsets, tiles).

    Offsets are int64 bytes, `rows` of them per tile.
    """

    address: int
    rows: int
    weights: Weights
    keep_alive: object


class _Text:
    """LLVM assembly being written; every value gets a fresh name."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._n = 0

    def line(self, text: str) -> None:
        self.lines.append(text)

    def let(self, text: str) -> str:
        self._n += 1
        name = f"%v{self._n}"
        self.lines.append(f"{name} = {text}")
        return name

    def at(self, base: str, element: str, index: str | int) -> str:
        return self.let(f"getelementptr {element}, ptr {base}, i64 {index}")

    def splat(self, element: str, value: str, n: int) -> str:
        one = self.let(f"insertelement <{n} x {element}> poison, {element} {value}, i32 0")
        zeros = f"<{n} x i32> zeroinitializer"
        return self.let(f"shufflevector <{n} x {element}> {one}, <{n} x {element}> poison, {zeros}")


F16 = f"<{LANES} x float>"
_DECLARE = f"""
declare {F16} @llvm.fma.v16f32({F16}, {F16}, {F16})
declare {F16} @llvm.maxnum.v16f32({F16}, {F16})
declare float @llvm.vector.reduce.fadd.v16f32(float, {F16})
declare void @llvm.masked.store.v16f32.p0({F16}, ptr, i32, <16 x i1>)
declare void @llvm.masked.store.v16bf16.p0(<16 x bfloat>, ptr, i32, <16 x i1>)
declare float @llvm.maxnum.f32(float, float)
"""
_DECLARE_BF16 = f"declare {F16} @llvm.x86.avx512bf16.dpbf16ps.512({F16}, <32 x bfloat>, <32 x bfloat>)"


@dataclass(frozen=True)
class _Layer:
    """What one kernel computes: `inner` input values per row, `outputs` sums, how they are read and written."""

    inner: int
    outputs: int
    relu: bool
    read: str  # precision of the input
    write: str  # precision of the output

    @property
    def vectors(self) -> int:
        over = self.outputs % LANES
        whole = self.outputs // LANES
        return whole + (over > 0 and not self.dot_outputs)

    @property
    def dot_outputs(self) -> int:
        """Outputs that are summed along the window. Cheaper than a vector only when the window is long."""
        over = self.outputs % LANES
        return over if 0 < over <= DOT_OUTPUTS and self.inner >= 256 else 0

    @property
    def per_lane(self) -> int:
        return 2 if self.read == BFLOAT16 else 1

    @property
    def rows(self) -> int:
        room = 24 if _features().get("avx512f") else 8
        return max(1, min(8, room // max(1, self.vectors)))

    def multiply(self, t: _Text, total: str, a: str, b: str) -> str:
        if self.read == BFLOAT16:
            two = "<32 x bfloat>"
            f = "@llvm.x86.avx512bf16.dpbf16ps.512"
            return t.let(f"call {F16} {f}({F16} {total}, {two} {a}, {two} {b})")
        return t.let(f"call {F16} @llvm.fma.v16f32({F16} {a}, {F16} {b}, {F16} {total})")

    @property
    def vector_type(self) -> str:
        return "<32 x bfloat>" if self.read == BFLOAT16 else F16

    def text(self) -> str:
        t = _Text()
        t.line("define void @tile(ptr %a, ptr %ao, ptr %panel, ptr %dots, ptr %bias, ptr %o, ptr %oo) {")
        t.line("entry:")
        rows = [t.at("%a", "i8", t.let(f"load i64, ptr {t.at('%ao', 'i64', r)}")) for r in range(self.rows)]
        outs = [t.at("%o", "i8", t.let(f"load i64, ptr {t.at('%oo', 'i64', r)}")) for r in range(self.rows)]
        at = "entry"
        if self.vectors:
            self._panel_loop(t, rows, outs)
            at = "stored"
        if self.dot_outputs:
            self._dot_loop(t, rows, outs, at)
        t.line("ret void\n}")
        t.line(_RUN.format(rows=self.rows))
        return "\n".join(t.lines) + _DECLARE + (_DECLARE_BF16 if self.read == BFLOAT16 else "")

    def _panel_loop(self, t: _Text, rows: list[str], outs: list[str]) -> None:
        v, n = self.vectors, self.rows
        steps = -(-self.inner // self.per_lane)
        bias = [t.let(f"load {F16}, ptr {t.at('%bias', 'float', LANES * i)}, align 64") for i in range(v)]
        t.line("br label %columns")
        t.line("columns:")
        t.line("%k = phi i64 [0, %entry], [%k1, %columns]")
        for r in range(n):
            for i in range(v):
                t.line(f"%sum{r}_{i} = phi {F16} [{bias[i]}, %entry], [%next{r}_{i}, %columns]")
        here = t.at("%panel", "i8", t.let(f"mul i64 %k, {_ALIGN * v}"))
        w = [
            t.let(f"load {self.vector_type}, ptr {t.at(here, 'i8', _ALIGN * i)}, align 64") for i in range(v)
        ]
        for r in range(n):
            element = "i32" if self.read == BFLOAT16 else "float"
            value = t.let(f"load {element}, ptr {t.at(rows[r], element, '%k')}, align 2")
            x = t.splat(element, value, LANES)
            if self.read == BFLOAT16:
                x = t.let(f"bitcast <{LANES} x i32> {x} to <32 x bfloat>")
            for i in range(v):
                new = self.multiply(t, f"%sum{r}_{i}", x, w[i])
                t.line(f"%next{r}_{i} = bitcast {F16} {new} to {F16}")
        t.line("%k1 = add i64 %k, 1")
        t.line(f"%enough = icmp eq i64 %k1, {steps}")
        t.line("br i1 %enough, label %stored, label %columns")
        t.line("stored:")
        for r in range(n):
            for i in range(v):
                self._store(t, f"%next{r}_{i}", outs[r], i)

    def _store(self, t: _Text, value: str, out: str, vector: int) -> None:
        if self.relu:
            value = t.let(f"call {F16} @llvm.maxnum.v16f32({F16} {value}, {F16} zeroinitializer)")
        size, kind, name = 4, F16, "v16f32"
        if self.write == BFLOAT16:
            size, kind, name = 2, "<16 x bfloat>", "v16bf16"
            value = t.let(f"fptrunc {F16} {value} to {kind}")
        place = t.at(out, "i8", LANES * size * vector)
        inside = min(LANES, self.outputs - LANES * vector)
        if inside == LANES:
            t.line(f"store {kind} {value}, ptr {place}, align 2")
            return
        mask = ", ".join(f"i1 {int(k < inside)}" for k in range(LANES))
        t.line(
            f"call void @llvm.masked.store.{name}.p0({kind} {value}, ptr {place}, i32 2, <16 x i1> <{mask}>)"
        )

    def _dot_loop(self, t: _Text, rows: list[str], outs: list[str], came_from: str) -> None:
        d, n = self.dot_outputs, self.rows
        step = LANES * self.per_lane
        steps = -(-self.inner // step)
        t.line("br label %dot")
        t.line("dot:")
        t.line(f"%m = phi i64 [0, %{came_from}], [%m1, %dot]")
        for r in range(n):
            for i in range(d):
                t.line(f"%dsum{r}_{i} = phi {F16} [zeroinitializer, %{came_from}], [%dnext{r}_{i}, %dot]")
        offset = t.let(f"mul i64 %m, {_ALIGN}")
        w = []
        for i in range(d):
            there = t.at(t.at("%dots", "i8", _ALIGN * steps * i), "i8", offset)
            w.append(t.let(f"load {self.vector_type}, ptr {there}, align 64"))
        for r in range(n):
            x = t.let(f"load {self.vector_type}, ptr {t.at(rows[r], 'i8', offset)}, align 2")
            for i in range(d):
                new = self.multiply(t, f"%dsum{r}_{i}", x, w[i])
                t.line(f"%dnext{r}_{i} = bitcast {F16} {new} to {F16}")
        t.line("%m1 = add i64 %m, 1")
        t.line(f"%dotted = icmp eq i64 %m1, {steps}")
        t.line("br i1 %dotted, label %reduce, label %dot")
        t.line("reduce:")
        first = LANES * self.vectors
        size, kind = (2, "bfloat") if self.write == BFLOAT16 else (4, "float")
        for i in range(d):
            bias = t.let(f"load float, ptr {t.at('%bias', 'float', first + i)}")
            for r in range(n):
                f = "reassoc float @llvm.vector.reduce.fadd.v16f32"
                total = t.let(f"call {f}(float {bias}, {F16} %dnext{r}_{i})")
                if self.relu:
                    total = t.let(f"call float @llvm.maxnum.f32(float {total}, float 0.0)")
                if self.write == BFLOAT16:
                    total = t.let(f"fptrunc float {total} to bfloat")
                t.line(f"store {kind} {total}, ptr {t.at(outs[r], 'i8', size * (first + i))}, align 2")


_RUN = """
define void @run(ptr %a, ptr %ao, ptr %panel, ptr %dots, ptr %bias, ptr %o, ptr %oo, i64 %tiles) {{
entry:
  %none = icmp sle i64 %tiles, 0
  br i1 %none, label %end, label %loop
loop:
  %i = phi i64 [0, %entry], [%i1, %loop]
  %x = mul i64 %i, {rows}
  %p = getelementptr i64, ptr %ao, i64 %x
  %q = getelementptr i64, ptr %oo, i64 %x
  call void @tile(ptr %a, ptr %p, ptr %panel, ptr %dots, ptr %bias, ptr %o, ptr %q)
  %i1 = add i64 %i, 1
  %done = icmp sge i64 %i1, %tiles
  br i1 %done, label %end, label %loop
end:
  ret void
}}
"""


def _pack(layer: _Layer, weight: np.ndarray, bias: np.ndarray) -> Weights:
    """weight (outputs, inner), bias (outputs,) float32 -> panel, dots, bias as the kernel reads them."""
    v, d, per = layer.vectors, layer.dot_outputs, layer.per_lane
    steps, dot_steps = -(-layer.inner // per), -(-layer.inner // (LANES * per))
    full = np.zeros((v * LANES, steps * per), np.float32)
    inside = min(v * LANES, len(weight))
    full[:inside, : layer.inner] = weight[:inside]
    panel = full.reshape(v, LANES, steps, per).transpose(2, 0, 1, 3)
    dots = np.zeros((d, dot_steps * LANES * per), np.float32)
    dots[:, : layer.inner] = weight[len(weight) - d :] if d else 0
    biases = aligned((v * LANES + LANES,), np.float32)
    biases[: len(bias)] = bias
    kind = np.uint16 if layer.read == BFLOAT16 else np.float32
    convert = to_bfloat16 if layer.read == BFLOAT16 else np.asarray
    out = []
    for values in (panel, dots):
        place = aligned(values.shape, kind)
        if values.size:
            place[...] = convert(np.ascontiguousarray(values))
        out.append(place)
    return Weights(out[0], out[1], biases)


@cache
def _compile(layer: _Layer) -> tuple[int, object]:
    """Machine code of a layer: (address of `run`, what must stay alive)."""
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    if _features().get("avx512f"):
        features += ",-prefer-256-bit"
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=binding.get_host_cpu_name(), features=features, opt=3)
    module = binding.parse_assembly(layer.text())
    module.verify()
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    return engine.get_function_address("run"), (engine, machine)


def build(weight: np.ndarray, bias: np.ndarray, relu: bool, read: str, write: str) -> Kernel:
    """Kernel for weight (outputs, inner) float32, inner values of a row in memory order; bias (outputs,)."""
    layer = _Layer(weight.shape[1], weight.shape[0], relu, read, write)
    address, alive = _compile(layer)
    return Kernel(address, layer.rows, _pack(layer, weight, bias), alive)


def call(kernel: Kernel, source: np.ndarray, at: np.ndarray, target: np.ndarray, to: np.ndarray) -> None:
    """Run one layer from Python (tests): rows at byte offsets `at` of source -> byte offsets `to` of target."""
    f = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 7, ctypes.c_int64)(kernel.address)
    w = kernel.weights
    if len(at) % kernel.rows or len(at) != len(to):
        raise ValueError(f"{len(at)} rows came; a multiple of {kernel.rows} is needed")
    f(
        source.ctypes.data, at.ctypes.data, w.panel.ctypes.data, w.dots.ctypes.data, w.bias.ctypes.data,
        target.ctypes.data, to.ctypes.data, len(at) // kernel.rows,
    )  # fmt: skip
