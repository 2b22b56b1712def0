// The functions that kernels.h declares for one instruction set. Each of portable.cc, avx2.cc and avx512.cc includes this file once,
// with SPARK_SET, the namespace, and SPARK_WIDTH, the number of floats in a vector.
#pragma once

#include "attention.h"
#include "attention_training.h"
#include "ffn.h"
#include "ffn_training.h"
#include "product.h"

namespace spark::SPARK_SET {

void compute(const Matmul<float>& m, Pool& pool) { matmul(m, pool); }
void compute(const Matmul<bf16>& m, Pool& pool) { matmul(m, pool); }
void compute(const Matmul<int8_t>& m, Pool& pool) { matmul(m, pool); }
void compute(const FFN<float>& m, Pool& pool) { ffn(m, pool); }
void compute(const FFN<bf16>& m, Pool& pool) { ffn(m, pool); }
void compute(const FFN<int8_t>& m, Pool& pool) { ffn(m, pool); }
void compute(const Attention<float>& m, Pool& pool) { attention(m, pool); }
void compute(const Attention<bf16>& m, Pool& pool) { attention(m, pool); }
void compute(const FFNForward& m, Pool& pool) { ffn_training(m, pool); }
void compute(const FFNBackward& m, Pool& pool) { ffn_training(m, pool); }
void compute(const AttentionForward& m, Pool& pool) { attention_training(m, pool); }
void compute(const AttentionBackward& m, Pool& pool) { attention_training(m, pool); }
void compute(const AddTransposed& m, Pool& pool) { add_transposed(m, pool); }
void compute(const Read& m, Pool& pool) { read(m, pool); }

}  // namespace spark::SPARK_SET
