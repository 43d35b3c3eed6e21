// The handlers that XLA calls, and what Python asks of the library when it loads it.
#include <algorithm>
#include <cstdio>
#include <vector>

#include "attention.h"
#include "attention_gradient.h"
#include "block.h"
#include "isas.h"
#include "rows.h"
#include "share.h"
#include "slices.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace moejax {

namespace ffi = xla::ffi;

namespace {

Type TypeOf(ffi::DataType type) { return type == ffi::BF16 ? Type::kBf16 : Type::kF32; }

const Isa& IsaAt(int64_t index) {
  const auto& isas = ChosenIsas().isas;
  return *isas[index < 0 ? isas.size() - 1 : std::min<size_t>(index, isas.size() - 1)];
}

// Below about ten microseconds of work, sharing it costs more than it helps. Few rows are decoded, and more calls follow.
Sharing HowShared(double multiplications, double bytes, bool few_rows) {
  if (multiplications < 4e5 && bytes < 2e5) return Sharing::kNone;
  return few_rows ? Sharing::kSoonAgain : Sharing::kOnce;
}

// Runs `block_of(task)` for each task.
template <class BlockOf>
void Run(ffi::ThreadPool& pool, const Isa& isa, const std::vector<Task>& tasks, Sharing sharing, BlockOf block_of) {
  auto sliced = std::make_shared<SlicedSums>(tasks, 1);
  auto work = [&isa, tasks, sliced, block_of](int64_t i) {
    thread_local Scratches scratches;
    const Task& task = tasks[i];
    Block block = block_of(task);
    float* sums = sliced->Of(task, scratches.sums);
    BlockProduct(isa, block, scratches, sums).Compute();
    if (sliced->Complete(task)) WriteSums(isa, block, sliced->First(task, sums), SumsStride(block.columns));
  };
  ShareTasks(pool, static_cast<int64_t>(tasks.size()), sharing, work);
}

struct Matrices {
  Right first;  // of group 0
  int64_t group_stride, scale_group_stride;

  Right At(int64_t group, int64_t column) const {
    Right right = first;
    right.data += group * group_stride + column * (right.columns_first ? right.stride : SizeOf(right.type));
    if (right.scales) right.scales += group * scale_group_stride + column * right.scale_stride;
    return right;
  }
};

// y[M, N] from x[M, K] and one matrix a group, cut into tasks; rows past the last group are a group more, whose product
// over nothing gives zeros.
class Grouped {
 public:
  Grouped(ffi::AnyBuffer x, Matrices matrices, ffi::Buffer<ffi::S32> sizes, ffi::AnyBuffer y)
      : matrices_(matrices), depth_(x.dimensions()[1]), columns_(y.dimensions()[1]), groups_(sizes.dimensions()[0]),
        out_type_(TypeOf(y.element_type())), out_(static_cast<char*>(y.untyped_data())) {
    int64_t rows = x.dimensions()[0];
    std::vector<int64_t> starts = GroupStarts(sizes.typed_data(), groups_, rows);
    int64_t cut = matrices.first.columns_first ? 0 : depth_;
    Tasks tasks(columns_);
    for (int64_t g = 0; g < groups_; ++g) {
      tasks.Add(g, starts[g], starts[g + 1] - starts[g], cut);
      matrices_read_ += starts[g + 1] > starts[g];
    }
    rows_ = starts[groups_];
    tasks.Add(groups_, rows_, rows - rows_);
    tasks_ = tasks.Cut();
    left_ = {static_cast<const char*>(x.untyped_data()), TypeOf(x.element_type()), 0, false};
    left_.stride = depth_ * SizeOf(left_.type);
  }

  const std::vector<Task>& Cut() const { return tasks_; }
  int64_t columns() const { return columns_; }

  // With `matrices` of this many columns for each of y.
  Sharing HowShared(int64_t wider) const {
    double size = static_cast<double>(depth_) * columns_ * wider;
    return moejax::HowShared(size * rows_, size * matrices_read_ * 2, rows_ <= kFewRows * matrices_read_);
  }

  // A task's product with the matrix' columns from `column` on.
  Block At(const Task& task, int64_t column) const {
    bool past = task.group == groups_;
    int64_t depth = task.Depth(task.slice, depth_);
    Block block{left_, past ? matrices_.first : matrices_.At(task.group, column), task.rows, task.columns,
                past ? 0 : task.Depth(task.slice + 1, depth_) - depth};
    block.left.data += task.row * left_.stride + depth * SizeOf(left_.type);
    if (depth > 0) block.right.data += depth * block.right.stride;
    block.out_type = out_type_;
    block.out_stride = columns_ * SizeOf(out_type_);
    block.out = out_ + task.row * block.out_stride + task.column * SizeOf(out_type_);
    return block;
  }

 private:
  Matrices matrices_;
  int64_t depth_, columns_, groups_, rows_ = 0, matrices_read_ = 0;
  Type out_type_;
  char* out_;
  Left left_;
  std::vector<Task> tasks_;
};

void GroupedProducts(ffi::ThreadPool& pool, ffi::AnyBuffer x, Matrices matrices, ffi::Buffer<ffi::S32> sizes,
                     ffi::AnyBuffer y, const Isa& isa) {
  Grouped grouped(x, matrices, sizes, y);
  Run(pool, isa, grouped.Cut(), grouped.HowShared(1), [=](const Task& task) { return grouped.At(task, task.column); });
}

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> sizes,
                    ffi::Result<ffi::AnyBuffer> y, bool transposed, int64_t row_stride, int64_t group_stride,
                    int64_t isa) {
  Type type = TypeOf(w.element_type());
  Right right{static_cast<const char*>(w.untyped_data()), nullptr, type, row_stride * SizeOf(type), 0, transposed};
  GroupedProducts(pool, x, {right, group_stride * SizeOf(type), 0}, sizes, *y, IsaAt(isa));
  return ffi::Error::Success();
}

ffi::Error PackedProducts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Buffer<ffi::U8> blocks,
                          ffi::Buffer<ffi::U8> scales, ffi::Buffer<ffi::S32> sizes, ffi::Result<ffi::AnyBuffer> y,
                          int64_t isa) {
  int64_t columns = scales.dimensions()[1], count = scales.dimensions()[2];
  Right right{reinterpret_cast<const char*>(blocks.typed_data()), scales.typed_data(), Type::kMxfp4,
              count * kBlockBytes, count, true};
  GroupedProducts(pool, x, {right, columns * right.stride, columns * count}, sizes, *y, IsaAt(isa));
  return ffi::Error::Success();
}

// y[M, F] = silu(x gate) * (x up), gate and up side by side in w[G, K, 2 F]: neither product is written to memory.
ffi::Error GatedProducts(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> sizes,
                         ffi::Result<ffi::AnyBuffer> y, int64_t isa) {
  const Isa& chosen = IsaAt(isa);
  Type type = TypeOf(w.element_type());
  Right first{static_cast<const char*>(w.untyped_data()), nullptr, type, w.dimensions()[2] * SizeOf(type), 0, false};
  Grouped grouped(x, {first, w.dimensions()[1] * first.stride, 0}, sizes, *y);
  auto sliced = std::make_shared<SlicedSums>(grouped.Cut(), 2);
  auto work = [grouped, sliced, &chosen](int64_t i) {
    thread_local Scratches scratches;
    const Task& task = grouped.Cut()[i];
    Block gate = grouped.At(task, task.column), up = grouped.At(task, grouped.columns() + task.column);
    float* sums = sliced->Of(task, scratches.sums);
    // Few rows are read where they lie, and then both halves of a matrix' rows in one go.
    bool both = task.rows <= kFewRows && task.columns == grouped.columns();
    int64_t stride = SumsStride(both ? 2 * task.columns : task.columns);
    int64_t up_sums = both ? task.columns : task.rows * stride;
    Block product = gate;
    if (both) product.columns *= 2;
    BlockProduct(chosen, product, scratches, sums).Compute();
    if (!both) BlockProduct(chosen, up, scratches, sums + up_sums).Compute();
    if (!sliced->Complete(task)) return;
    sums = sliced->First(task, sums);
    for (int64_t r = 0; r < task.rows; ++r)
      chosen.silu_multiply(sums + r * stride, sums + r * stride + up_sums, task.columns);
    WriteSums(chosen, gate, sums, stride);
  };
  ShareTasks(pool, static_cast<int64_t>(grouped.Cut().size()), grouped.HowShared(2), work);
  return ffi::Error::Success();
}

// dw[G, K, N]: each group's x.T dy, a product whose depth is the group's rows.
ffi::Error WeightGradient(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer dy, ffi::Buffer<ffi::S32> sizes,
                          ffi::Result<ffi::AnyBuffer> dw, int64_t isa) {
  int64_t inputs = x.dimensions()[1], columns = dy.dimensions()[1], groups = sizes.dimensions()[0];
  std::vector<int64_t> starts = GroupStarts(sizes.typed_data(), groups, x.dimensions()[0]);
  Tasks tasks(columns);
  for (int64_t g = 0; g < groups; ++g) tasks.Add(g, 0, inputs);

  Left left{static_cast<const char*>(x.untyped_data()), TypeOf(x.element_type()), 0, true};
  left.stride = inputs * SizeOf(left.type);
  Right right{static_cast<const char*>(dy.untyped_data()), nullptr, TypeOf(dy.element_type()), 0, 0, false};
  right.stride = columns * SizeOf(right.type);
  char* out = static_cast<char*>(dw->untyped_data());
  Type out_type = TypeOf(dw->element_type());
  auto block_of = [=](const Task& task) {
    int64_t start = starts[task.group];
    Block block{left, right, task.rows, task.columns, starts[task.group + 1] - start};
    block.left.data += start * left.stride + task.row * SizeOf(left.type);
    block.right.data += start * right.stride + task.column * SizeOf(right.type);
    block.out_type = out_type;
    block.out_stride = columns * SizeOf(out_type);
    block.out = out + (task.group * inputs + task.row) * block.out_stride + task.column * SizeOf(out_type);
    return block;
  };
  double size = static_cast<double>(inputs) * columns;
  Run(pool, IsaAt(isa), tasks.Cut(), HowShared(size * starts[groups], size * groups * 4, false), block_of);
  return ffi::Error::Success();
}

// Null for an operand that is not there, which comes as an empty array.
template <class T>
const T* MayBeEmpty(const T* data, size_t elements) {
  return elements ? data : nullptr;
}

using Ints = ffi::Buffer<ffi::S32>;

Attention AttentionOf(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints first, Ints last,
                      Ints query_segments, Ints places, Ints key_segments, float scale, void* out, float* logs) {
  auto q_shape = q.dimensions(), k_shape = k.dimensions();
  return {static_cast<const char*>(q.untyped_data()),
          static_cast<const char*>(k.untyped_data()),
          static_cast<const char*>(v.untyped_data()),
          TypeOf(q.element_type()),
          q_shape[0], q_shape[1], q_shape[2], k_shape[1], k_shape[2], q_shape[3], v.dimensions()[3],
          nullptr,
          first.typed_data(),
          last.typed_data(),
          MayBeEmpty(query_segments.typed_data(), query_segments.element_count()),
          places.typed_data(),
          MayBeEmpty(key_segments.typed_data(), key_segments.element_count()),
          scale,
          static_cast<char*>(out),
          logs};
}

Sharing HowShared(const Attention& a) {
  double pairs = 1.0 * a.batch * a.heads * a.queries * a.keys;
  double values = 1.0 * a.batch * a.groups * a.keys * (a.width + a.value_width);
  return HowShared(pairs * (a.width + a.value_width), values * SizeOf(a.type), a.queries == 1);
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                  ffi::Buffer<ffi::F32> sinks, Ints first, Ints last, Ints query_segments, Ints places,
                  Ints key_segments, ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::Buffer<ffi::F32>> logs,
                  float scale, int64_t isa) {
  Attention attention = AttentionOf(q, k, v, first, last, query_segments, places, key_segments, scale,
                                    out->untyped_data(), logs->typed_data());
  attention.sinks = MayBeEmpty(sinks.typed_data(), sinks.element_count());
  const Isa& chosen = IsaAt(isa);
  std::vector<AttentionTask> tasks = AttentionTasks(attention);
  auto work = [attention, tasks, &chosen](int64_t i) {
    thread_local AttentionScratches scratches;
    AttentionBlock(chosen, attention, tasks[i], scratches).Run();
  };
  ShareTasks(pool, static_cast<int64_t>(tasks.size()), HowShared(attention), work);
  return ffi::Error::Success();
}

ffi::Error AttendGradient(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Ints first,
                          Ints last, Ints query_segments, Ints places, Ints key_segments, ffi::AnyBuffer out,
                          ffi::Buffer<ffi::F32> logs, ffi::AnyBuffer dout, ffi::Result<ffi::AnyBuffer> dq,
                          ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv, float scale, int64_t isa) {
  AttentionGradient gradient{AttentionOf(q, k, v, first, last, query_segments, places, key_segments, scale,
                                         out.untyped_data(), logs.typed_data()),
                             static_cast<const char*>(dout.untyped_data()),
                             static_cast<char*>(dq->untyped_data()),
                             static_cast<char*>(dk->untyped_data()),
                             static_cast<char*>(dv->untyped_data())};
  const Isa& chosen = IsaAt(isa);
  auto work = [gradient, &chosen](int64_t i) {
    thread_local GradientScratches scratches;
    AttentionGradientTask(chosen, gradient, i, scratches).Run();
  };
  ShareTasks(pool, gradient.forward.batch * gradient.forward.groups, HowShared(gradient.forward), work);
  return ffi::Error::Success();
}

ffi::Error Take(ffi::ThreadPool pool, ffi::AnyBuffer table, Ints index, ffi::Result<ffi::AnyBuffer> out) {
  constexpr int64_t kEach = 64;
  int64_t count = table.dimensions()[0], rows = index.element_count();
  int64_t row_bytes = count ? table.size_bytes() / count : 0;
  const char* from = static_cast<const char*>(table.untyped_data());
  char* to = static_cast<char*>(out->untyped_data());
  auto work = [=, index = index.typed_data()](int64_t i) {
    TakeRows(from, count, row_bytes, index, i * kEach, std::min(rows, (i + 1) * kEach), to);
  };
  ShareTasks(pool, (rows + kEach - 1) / kEach, HowShared(0, 1.0 * rows * row_bytes, false), work);
  return ffi::Error::Success();
}

// XLA gives `out` the memory of `places`, so that only the new rows are written.
ffi::Error Put(ffi::AnyBuffer places, ffi::AnyBuffer fresh, Ints index, ffi::Result<ffi::AnyBuffer> out) {
  auto shape = places.dimensions();
  if (out->untyped_data() != places.untyped_data())
    std::memcpy(out->untyped_data(), places.untyped_data(), places.size_bytes());
  int64_t rows = shape[0] * shape[1] * shape[2];
  PutRows(static_cast<char*>(out->untyped_data()), shape[0], shape[1], shape[2], rows ? places.size_bytes() / rows : 0,
          static_cast<const char*>(fresh.untyped_data()), index.typed_data(), index.dimensions()[1]);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_attend, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_attend_gradient, AttendGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_take, Take,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Arg<ffi::AnyBuffer>().Arg<Ints>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    moejax_put, Put, ffi::Ffi::Bind().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>().Arg<Ints>().Ret<ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_products, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed")
                                  .Attr<int64_t>("row_stride")
                                  .Attr<int64_t>("group_stride")
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_gated_products, GatedProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_packed_products, PackedProducts,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(moejax_weight_gradient, WeightGradient,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("isa"));

// Writes the usable instruction sets, the best last, and after a semicolon those that failed their check.
extern "C" void moejax_instruction_sets(char* text, int64_t size) {
  const Choice& choice = ChosenIsas();
  std::string names;
  for (const Isa* isa : choice.isas) names += std::string(names.empty() ? "" : ",") + isa->name;
  std::snprintf(text, size, "%s;%s", names.c_str(), choice.refused.c_str());
}

#pragma GCC visibility pop

}  // namespace moejax
