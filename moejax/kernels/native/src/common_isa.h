// What every instruction set that includes vectors.h and softmax.h gives in the same words, in its namespace.

constexpr Isa CommonIsa(const char* name) {
  Isa isa{};
  isa.name = name;
  isa.tile_rows = kRows;
  isa.tile_f32 = Tiles<Floats>;
  isa.stream_f32 = StreamRows<Floats, FloatRows>;
  isa.dots_f32 = DotRows<Floats>;
  isa.transpose = Transpose;
  isa.widen = Widen;
  isa.narrow = Narrow;
  isa.mask = Mask;
  isa.powers = Powers;
  isa.slopes = Slopes;
  isa.fade_add = FadeAdd;
  isa.silu_multiply = SiluMultiply;
  isa.unpack_mxfp4 = UnpackMxfp4;
  return isa;
}
