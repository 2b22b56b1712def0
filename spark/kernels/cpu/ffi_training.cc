// The kernels of training as custom calls of XLA.

#include "ffi.h"

namespace spark {
namespace {

ffi::Error FFNForwardImpl(ffi::ThreadPool threads, int64_t set, float quantile, float huber, int64_t ddof, Floats scores, Floats x2,
                          Floats k2, Floats v, ffi::Result<Floats> y, ffi::Result<Floats> statistics, ffi::Result<Ints> active) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (scores.dimensions().size() != 2 || x2.dimensions().size() != 2 || v.dimensions().size() != 2)
    return wrong_shape("scores", scores, "two axes, as x2 and v");
  const int64_t tokens = scores.dimensions()[0], neurons = scores.dimensions()[1], width = x2.dimensions()[1], D = v.dimensions()[1];
  if ((tokens + 16) * neurons > INT_MAX) return wrong_shape("scores", scores, "(tokens + 16) * neurons < 2^31");
  REQUIRE_SHAPE(x2, tokens, width);
  REQUIRE_SHAPE(k2, width, neurons);
  REQUIRE_SHAPE(v, neurons, D);
  REQUIRE_SHAPE(*y, tokens, D);
  REQUIRE_SHAPE(*statistics, tokens, 3);
  REQUIRE_SHAPE(*active, tokens);
  XlaPool pool(threads);
  FFNForward m{int(tokens), int(neurons), int(width), int(D), quantile, huber, int(ddof), scores.typed_data(), x2.typed_data(),
               k2.typed_data(), v.typed_data(), y->typed_data(), statistics->typed_data(), active->typed_data()};
  compute(*use, m, pool);
  return ffi::Error::Success();
}

ffi::Error FFNBackwardImpl(ffi::ThreadPool threads, int64_t set, float quantile, float huber, int64_t ddof, Floats scores,
                           Floats statistics, Floats x1, Floats x2, Floats dy, Floats k1, Floats k2, Floats v, ffi::Result<Floats> ds,
                           ffi::Result<Floats> dx1, ffi::Result<Floats> dx2, ffi::Result<Floats> dk1, ffi::Result<Floats> dk2,
                           ffi::Result<Floats> dv, ffi::Result<Floats> slopes) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (scores.dimensions().size() != 2 || x1.dimensions().size() != 2 || x2.dimensions().size() != 2 || v.dimensions().size() != 2)
    return wrong_shape("scores", scores, "two axes, as x1, x2 and v");
  const int64_t tokens = scores.dimensions()[0], neurons = scores.dimensions()[1], D = v.dimensions()[1];
  const int64_t r = x1.dimensions()[1], width = x2.dimensions()[1];
  const bool dense = ds->element_count() > 0;
  if ((tokens + 16) * neurons > INT_MAX) return wrong_shape("scores", scores, "(tokens + 16) * neurons < 2^31");
  REQUIRE_SHAPE(statistics, tokens, 3);
  REQUIRE_SHAPE(x1, tokens, r);
  REQUIRE_SHAPE(x2, tokens, width);
  REQUIRE_SHAPE(dy, tokens, D);
  REQUIRE_SHAPE(k1, r, neurons);
  REQUIRE_SHAPE(k2, width, neurons);
  REQUIRE_SHAPE(v, neurons, D);
  REQUIRE_SHAPE(*ds, dense ? tokens : 0, neurons);
  if (dense && ds->typed_data() != scores.typed_data()) return ffi::Error::Internal("the scores were not replaced by their gradient");
  REQUIRE_SHAPE(*dx1, dense ? 0 : tokens, r);
  REQUIRE_SHAPE(*dx2, tokens, width);
  REQUIRE_SHAPE(*dk1, dense ? 0 : neurons, r);
  REQUIRE_SHAPE(*dk2, width, neurons);
  REQUIRE_SHAPE(*dv, neurons, D);
  REQUIRE_SHAPE(*slopes, tokens, 2);
  XlaPool pool(threads);
  FFNBackward m{int(tokens), int(neurons), int(r), int(width), int(D), quantile, huber, int(ddof), scores.typed_data(),
                statistics.typed_data(), x1.typed_data(), x2.typed_data(), dy.typed_data(), k1.typed_data(), k2.typed_data(),
                v.typed_data(), dense ? ds->typed_data() : nullptr, dx1->typed_data(), dx2->typed_data(), dk1->typed_data(),
                dk2->typed_data(), dv->typed_data(), slopes->typed_data()};
  compute(*use, m, pool);
  return ffi::Error::Success();
}

ffi::Error check_attention(Ints starts, Floats q, Floats k, Floats v, int64_t r) {
  if (q.dimensions().size() != 5) return wrong_shape("q", q, "(batch, heads, group, length, head_dim)");
  const Dims s = q.dimensions();
  const int64_t batch = s[0], heads = s[1], length = s[3], head_dim = s[4];
  REQUIRE_SHAPE(k, batch, heads, length, head_dim);
  REQUIRE_SHAPE(v, batch, heads, length, head_dim);
  REQUIRE_SHAPE(starts, batch, length);
  if (r < 1 || r >= head_dim) return wrong_shape("q", q, "a head_dim above r = " + std::to_string(r));
  const int32_t* start = starts.typed_data();
  for (int64_t i = 0; i < batch * length; ++i)
    if (start[i] < (i % length ? start[i - 1] : 0) || start[i] > i % length)
      return ffi::Error::InvalidArgument("starts: want a key up to the query's own, and none before that of the query before");
  return ffi::Error::Success();
}

AttentionInputs attention_inputs(Ints starts, Floats q, Floats k, Floats v, int64_t r, float cap) {
  const Dims s = q.dimensions();
  return {int(s[0]), int(s[1]), int(s[2]), int(s[3]), int(s[4]), int(r), cap, starts.typed_data(), q.typed_data(), k.typed_data(),
          v.typed_data()};
}

ffi::Error AttentionForwardImpl(ffi::ThreadPool threads, int64_t set, int64_t r, int64_t keep, float cap, Ints starts, Floats q, Floats k,
                                Floats v, Floats quantiles, ffi::Result<Floats> y, ffi::Result<Floats> thetas, ffi::Result<Floats> log_z,
                                ffi::Result<Floats> attended) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (auto error = check_attention(starts, q, k, v, r); error.failure()) return error;
  const Dims s = q.dimensions();
  const int64_t batch = s[0], heads = s[1], group = s[2], length = s[3], head_dim = s[4];
  REQUIRE_SHAPE(quantiles, length + 1);
  REQUIRE_SHAPE(*y, batch, heads, group, length, head_dim);
  REQUIRE_SHAPE(*thetas, batch, heads, group, length);
  REQUIRE_SHAPE(*log_z, batch, heads, group, length);
  REQUIRE_SHAPE(*attended, batch, heads, group, length);
  XlaPool pool(threads);
  compute(*use, AttentionForward{attention_inputs(starts, q, k, v, r, cap), int(keep), quantiles.typed_data(), y->typed_data(),
                                 thetas->typed_data(), log_z->typed_data(), attended->typed_data()}, pool);
  return ffi::Error::Success();
}

ffi::Error AttentionBackwardImpl(ffi::ThreadPool threads, int64_t set, int64_t r, float cap, Ints starts, Floats q, Floats k, Floats v,
                                 Floats thetas, Floats log_z, Floats y, Floats dy, ffi::Result<Floats> dq, ffi::Result<Floats> dk,
                                 ffi::Result<Floats> dv) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (auto error = check_attention(starts, q, k, v, r); error.failure()) return error;
  const Dims s = q.dimensions();
  const int64_t batch = s[0], heads = s[1], group = s[2], length = s[3], head_dim = s[4];
  REQUIRE_SHAPE(thetas, batch, heads, group, length);
  REQUIRE_SHAPE(log_z, batch, heads, group, length);
  REQUIRE_SHAPE(y, batch, heads, group, length, head_dim);
  REQUIRE_SHAPE(dy, batch, heads, group, length, head_dim);
  REQUIRE_SHAPE(*dq, batch, heads, group, length, head_dim);
  REQUIRE_SHAPE(*dk, batch, heads, length, head_dim);
  REQUIRE_SHAPE(*dv, batch, heads, length, head_dim);
  XlaPool pool(threads);
  compute(*use, AttentionBackward{attention_inputs(starts, q, k, v, r, cap), thetas.typed_data(), log_z.typed_data(), y.typed_data(),
                                  dy.typed_data(), dq->typed_data(), dk->typed_data(), dv->typed_data()}, pool);
  return ffi::Error::Success();
}

ffi::Error AddTransposedImpl(ffi::ThreadPool threads, int64_t set, Floats y, Floats x, Floats bias, ffi::Result<Floats> sum) {
  auto use = resolve(set);
  if (use.has_error()) return use.error();
  if (x.dimensions().size() != 2) return wrong_shape("x", x, "two axes");
  const int64_t rows = x.dimensions()[0], columns = x.dimensions()[1];
  REQUIRE_SHAPE(y, columns, rows);
  REQUIRE_SHAPE(bias, columns);
  REQUIRE_SHAPE(*sum, columns, rows);
  if (sum->typed_data() != y.typed_data()) return ffi::Error::Internal("the sum was not updated in place");
  XlaPool pool(threads);
  compute(*use, AddTransposed{int(rows), int(columns), x.typed_data(), bias.typed_data(), sum->typed_data()}, pool);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace spark

XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn_forward, spark::FFNForwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("quantile").Attr<float>("huber")
                                  .Attr<int64_t>("ddof").Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Ints>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_ffn_backward, spark::FFNBackwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<float>("quantile").Attr<float>("huber")
                                  .Attr<int64_t>("ddof").Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>()
                                  .Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_add_transposed, spark::AddTransposedImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_attention_forward, spark::AttentionForwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<int64_t>("r").Attr<int64_t>("keep")
                                  .Attr<float>("cap").Arg<spark::Ints>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>().Ret<spark::Floats>()
                                  .Ret<spark::Floats>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(spark_attention_backward, spark::AttentionBackwardImpl,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attr<int64_t>("set").Attr<int64_t>("r").Attr<float>("cap")
                                  .Arg<spark::Ints>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>()
                                  .Arg<spark::Floats>().Arg<spark::Floats>().Arg<spark::Floats>().Ret<spark::Floats>()
                                  .Ret<spark::Floats>().Ret<spark::Floats>());
