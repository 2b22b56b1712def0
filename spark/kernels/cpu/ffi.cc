// The kernels of decoding and prefill as custom calls of XLA.

#include <type_traits>

#include "ffi.h"

namespace spark {
namespace {

// f(a value of the weights' element type)
template <class F>
ffi::Error dispatch_type(ffi::AnyBuffer w, F f) {
  switch (w.element_type()) {
    case ffi::DataType::F32: return f(float{});
    case ffi::DataType::BF16: return f(bf16{});
    case ffi::DataType::S8: return f(int8_t{});
    default: return ffi::Error::InvalidArgument("weights: want float32, bfloat16 or int8");
  }
}

template <class T>
Rows<T> rows(ffi::AnyBuffer values, ffi::Buffer<ffi::F32> scales) {
  return {static_cast<const T*>(values.untyped_data()), std::is_same_v<T, int8_t> ? scales.typed_data() : nullptr};
}

ffi::Error MatmulImpl(ffi::ThreadPool threads, int64_t set, Floats x, ffi::AnyBuffer w, Floats scales, ffi::Result<Floats> y) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2 || w.dimensions().size() != 2) return wrong_shape("w", w, "two axes, as x");
  const int64_t tokens = x.dimensions()[0], in = x.dimensions()[1], out = w.dimensions()[0];
  REQUIRE_SHAPE(w, out, in);
  REQUIRE_SHAPE(*y, tokens, out);
  return dispatch_type(w, [&](auto type) {
    using T = decltype(type);
    if (std::is_same_v<T, int8_t> && !has_shape(scales, {out})) return wrong_shape("scales", scales, "a float per row of int8 weights");
    XlaPool pool(threads);
    Matmul<T> m{int(tokens), int(in), int(out), x.typed_data(), rows<T>(w, scales), y->typed_data()};
    compute(*use, m, pool);
    return ffi::Error::Success();
  });
}

ffi::Error FFNImpl(ffi::ThreadPool threads, int64_t set, float quantile, float huber, Floats x, ffi::AnyBuffer k1, Floats k1_scales,
                   ffi::AnyBuffer records, Floats record_scales, ffi::Result<Floats> y, ffi::Result<Ints> active,
                   ffi::Result<Ints> read) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2 || k1.dimensions().size() != 2) return wrong_shape("k1", k1, "two axes, as x");
  const int64_t tokens = x.dimensions()[0], D = x.dimensions()[1], neurons = k1.dimensions()[0], r = k1.dimensions()[1];
  REQUIRE_SHAPE(records, neurons, 2 * D - r);
  REQUIRE_SHAPE(*y, tokens, D);
  REQUIRE_SHAPE(*active, tokens);
  REQUIRE_SHAPE(*read);
  if (records.element_type() != k1.element_type()) return ffi::Error::InvalidArgument("k1 and records: want one dtype");
  return dispatch_type(k1, [&](auto type) {
    using T = decltype(type);
    if (std::is_same_v<T, int8_t> && !(has_shape(k1_scales, {neurons}) && has_shape(record_scales, {neurons, 2})))
      return wrong_shape("record_scales", record_scales, "(neurons, 2), and (neurons) for k1, of int8 weights");
    XlaPool pool(threads);
    FFN<T> m{int(tokens), int(D), int(neurons), int(r), quantile, huber, x.typed_data(), rows<T>(k1, k1_scales),
             rows<T>(records, record_scales), y->typed_data(), active->typed_data(), read->typed_data()};
    compute(*use, m, pool);
    return ffi::Error::Success();
  });
}

ffi::Error AttentionImpl(ffi::ThreadPool threads, int64_t set, int64_t k, int64_t window, float cap, Floats q, Floats fresh,
                         ffi::AnyBuffer keys, ffi::AnyBuffer records, Ints first, Ints length, Floats quantiles, ffi::Result<Floats> y,
                         ffi::Result<Ints> attended, ffi::Result<ffi::AnyBuffer> new_keys, ffi::Result<ffi::AnyBuffer> new_records) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (q.dimensions().size() != 5) return wrong_shape("q", q, "(batch, heads, group, tokens, head_dim)");
  if (keys.dimensions().size() != 4) return wrong_shape("keys", keys, "(batch, heads, slots, r)");
  Dims s = q.dimensions();
  const int64_t B = s[0], N = s[1], G = s[2], L = s[3], d = s[4], slots = keys.dimensions()[2], r = keys.dimensions()[3];
  REQUIRE_SHAPE(fresh, B, N, L, 2 * d);
  REQUIRE_SHAPE(keys, B, N, slots, r);
  REQUIRE_SHAPE(records, B, N, slots, 2 * d - r);
  REQUIRE_SHAPE(first, B);
  REQUIRE_SHAPE(length);
  REQUIRE_SHAPE(*y, B, N, G, L, d);
  REQUIRE_SHAPE(*attended, B, N, G, L);
  if (k) REQUIRE_SHAPE(quantiles, slots + 1);
  if (r > d || (!k && r != d)) return wrong_shape("keys", keys, "r below head_dim for a top-k, or r = head_dim for dense attention");
  const int64_t before = length.typed_data()[0], after = before + L, visible = window ? std::min(window + L - 1, after) : after;
  if (before < 0 || visible > slots) return wrong_shape("keys", keys, "a slot for every position that the queries see");
  if (records.element_type() != keys.element_type()) return ffi::Error::InvalidArgument("keys and records: want one dtype");
  if (new_keys->untyped_data() != keys.untyped_data() || new_records->untyped_data() != records.untyped_data())
    return ffi::Error::Internal("the cache was not updated in place");
  return dispatch_type(keys, [&](auto type) {
    using T = decltype(type);
    if constexpr (std::is_same_v<T, int8_t>) {
      return ffi::Error::InvalidArgument("keys: want float32 or bfloat16");
    } else {
      XlaPool pool(threads);
      Attention<T> m{int(B), int(N), int(G), int(L), int(d), int(r), int(slots), int(k), int(window), cap, int(before),
                     first.typed_data(), quantiles.typed_data(), q.typed_data(), fresh.typed_data(),
                     static_cast<T*>(new_keys->untyped_data()), static_cast<T*>(new_records->untyped_data()), y->typed_data(),
                     attended->typed_data()};
      compute(*use, m, pool);
      return ffi::Error::Success();
    }
  });
}

ffi::Error ReadImpl(ffi::ThreadPool threads, int64_t set, Floats x, ffi::Result<Floats> y) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  XlaPool pool(threads);
  compute(*use, Read{int64_t(x.element_count()), x.typed_data(), y->typed_data()}, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace spark

extern "C" int spark_best_set() { return spark::best(); }

XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_matmul, spark::MatmulImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set")
                                  .Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn, spark::FFNImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("quantile").Attr<float>("huber")
                                  .Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<spark::Floats>().Arg<ffi::AnyBuffer>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>().Ret<spark::Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_attention, spark::AttentionImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<int64_t>("k").Attr<int64_t>("window")
                                  .Attr<float>("cap").Arg<spark::Floats>().Arg<spark::Floats>().Arg<ffi::AnyBuffer>().Arg<ffi::AnyBuffer>()
                                  .Arg<spark::Ints>().Arg<spark::Ints>().Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>()
                                  .Ret<ffi::AnyBuffer>().Ret<ffi::AnyBuffer>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_read, spark::ReadImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Arg<spark::Floats>().Ret<spark::Floats>());
