/* What a run of round.pml may choose, each by -D (model/run.py sets them), and what follows from it. */

#ifndef N
#define N 4                  /* members of the roster, 6 at most */
#endif
#ifndef C
#define C 1                  /* colluders, and the policy's max_colluders */
#endif
#ifndef SMALLEST
#define SMALLEST 3           /* min_survivors = min_cohort */
#endif
#ifndef ROUNDS
#define ROUNDS 0             /* 0: any number of rounds */
#endif
#ifndef CHECK
#define CHECK 63             /* which properties are asserted: bit 0 is P1, bit 1 is P2, ... */
#endif
#ifndef REACH                /* is a sum opened after a retry by (a): 1, by (b): 2, once more after one by (c): 4? */
#define REACH 0
#endif
#ifndef SYMMETRY             /* rename honest members after each round, for a smaller search */
#define SYMMETRY 0
#endif

#ifndef CHEATS               /* a rule that may be had either way: (c) allows the list less proven cheats */
#define CHEATS 0
#endif

/* --- rules taken out or weakened, to see the model fail */
#ifndef T_LOWERED            /* t - 1 */
#define T_LOWERED 0
#endif
#ifndef NO_SIGNED_RECORD     /* nothing on disk forbids a second M7 after a crash */
#define NO_SIGNED_RECORD 0
#endif
#ifndef SHORT_ABORT          /* one abort statement fewer is enough for (a) */
#define SHORT_ABORT 0
#endif
#ifndef ANY_T2               /* (b) takes a certificate under any T2 of the round */
#define ANY_T2 0
#endif
#ifndef NO_BOND              /* (c) without "that very list from then on" */
#define NO_BOND 0
#endif
#ifndef BOND_AT_M7_ONLY      /* a member bound by (c) takes any M4, and so uploads next to others */
#define BOND_AT_M7_ONLY 0
#endif
#ifndef ABORTED_IGNORED      /* M8 is accepted after ABORTED */
#define ABORTED_IGNORED 0
#endif
#ifndef RECORD_LATE          /* M9 leaves before RELEASED is durable */
#define RECORD_LATE 0
#endif

#define HN      (N - C)
#define ALL     ((1 << N) - 1)
#define HONEST  ((1 << HN) - 1)
#define COL     (ALL & ~HONEST)
#define BIT(i)  (1 << (i))
#define ONE(x, i) (((x) >> (i)) & 1)
#define SIZE(x) (ONE(x, 0) + ONE(x, 1) + ONE(x, 2) + ONE(x, 3) + ONE(x, 4) + ONE(x, 5))
#define T(u1)      ((SIZE(u1) + C) / 2 + 1 - T_LOWERED)
#define QUORUM(u1) (T(u1) > SMALLEST -> T(u1) : SMALLEST)
#if CHEATS
#define SAME(a, b) (((a) & HONEST) == ((b) & HONEST))
#else
#define SAME(a, b) ((a) == (b))
#endif

#define ASSERTED(number) (CHECK & (1 << ((number) - 1)))
#define HOLDS(p, number, condition) p = (condition) || !ASSERTED(number); assert(p)
